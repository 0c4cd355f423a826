"""Which pairs each optimizer step uses, and on which rank: a pure function of the settings, known before training.

Because every rank knows the whole plan, the denominators of a step (pairs, chosen tokens, rejected tokens over all
ranks and accumulation) are counted, not communicated, and a run that was cut off continues with the same batches.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nbg_core.base.ids import seed_from
from nbg_core.config.training import TrainingSettings


@dataclass(frozen=True)
class Step:
    """One optimizer step: 0-based `index`, 0-based pass over the data, and its pairs (positions in the data)."""

    index: int
    epoch: int
    pairs: np.ndarray


class Plan:
    """The optimizer steps of a training. Each epoch is a new order of all pairs; its last batch may be smaller.

    It holds the orders of at most two epochs, those that were used last: 16 bytes per pair. Threads may share it."""

    def __init__(self, n_pairs: int, settings: TrainingSettings):
        """Raises ValueError without pairs."""
        if n_pairs == 0:
            raise ValueError("there are no pairs to train on; lower preference.min_margin, or sample more responses")
        self._n_pairs, self._seed, self._batch = n_pairs, settings.seed, settings.global_batch_pairs
        self._per_epoch = -(-n_pairs // self._batch)
        n = settings.epochs * self._per_epoch
        self._n_steps = n if settings.max_steps is None else min(n, settings.max_steps)
        self._order = lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=seed_from("order", self._seed, epoch)))
        return generator.permutation(self._n_pairs)

    def __len__(self) -> int:
        return self._n_steps

    def __getitem__(self, index: int) -> Step:
        if not 0 <= index < self._n_steps:
            raise IndexError(f"step {index} of {self._n_steps}")
        epoch, place = divmod(index, self._per_epoch)
        return Step(index, epoch, self._order(epoch)[place * self._batch : (place + 1) * self._batch])


def micro_batches(
    pairs: np.ndarray, n_inputs: np.ndarray, settings: TrainingSettings, rank: int, world_size: int, *,
    padded: bool = False,
) -> list[np.ndarray]:  # fmt: skip
    """A rank's micro-batches of a step that uses `pairs`, as arrays of pairs; `n_inputs[pair]` is a pair's tokens.

    Pairs go, longest first, to the rank with the fewest tokens so far, so that the tokens of two ranks differ by no
    more than the longest pair. Each rank fills micro-batches of `micro_batch_tokens`: each pair, longest first, goes
    into the first one with room (first-fit decreasing: at most 11/9 of the fewest possible, plus one). With `padded`,
    every pair takes as many tokens as the longest of its micro-batch, so each micro-batch is filled with the pairs that
    come next in that order.

    With `sequence_parallel` = P, P neighbouring ranks count as one: they get the same micro-batches, of P times the
    tokens. All ranks return the same number of micro-batches, some of them empty: a rank with fewer would leave the
    others waiting in a collective."""
    together = settings.sequence_parallel
    rank, world_size = rank // together, world_size // together
    longest_first = sorted(pairs.tolist(), key=lambda pair: (-n_inputs[pair], pair))
    loads = [(0, r) for r in range(world_size)]
    shares: list[list[int]] = [[] for _ in loads]
    for pair in longest_first:
        load, r = loads[0]
        shares[r].append(pair)
        heapq.heapreplace(loads, (load + int(n_inputs[pair]), r))
    fill = _in_order if padded else _first_fit
    cut = [fill(share, n_inputs, settings.micro_batch_tokens * together) for share in shares]
    empty: list[list[int]] = [[]] * (max(map(len, cut)) - len(cut[rank]))
    return [np.array(batch, dtype=np.int64) for batch in cut[rank] + empty]


def _first_fit(share: list[int], n_inputs: np.ndarray, budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for pair in share:
        n = int(n_inputs[pair])
        at = next((i for i, left in enumerate(room) if n <= left), None)
        if at is None:
            at = len(batches)
            batches.append([])
            room.append(budget)
        batches[at].append(pair)
        room[at] -= n
    return batches


def _in_order(share: list[int], n_inputs: np.ndarray, budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for pair in share:
        if batches and (len(batches[-1]) + 1) * int(n_inputs[batches[-1][0]]) <= budget:
            batches[-1].append(pair)
        else:
            batches.append([pair])
    return batches
