"""Batches of pairs: from the training set's files to the tensors of one forward pass, made ahead of their use.

A thread that stays a few batches ahead of the training step reads the batches (`prefetch`). Of every other pair, memory
holds three numbers: how many tokens it has, and its place in the orders of two epochs.

Shapes: B pairs of a micro-batch, T response tokens of all its responses, concatenated.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nbg_core.losses.joint import Denominators
from nbg_core.losses.targets import TeacherTargets
from nbg_core.modeling.forward import collate
from nbg_core.modeling.packing import Pack
from nbg_core.modeling.padded import Padded
from nbg_core.teacher.store import decode
from nbg_core.training.pair_files import PairFiles

AHEAD = 2
"""Number of batches that are ready before their turn."""

T = TypeVar("T")


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch; [T] arrays are already shifted: row t of the hidden states predicts token t."""

    inputs: Pack | Padded
    """The input of the model; without pairs one token, so that the rank still takes part."""
    token_ids: Tensor
    """[T] int64: chosen of the first pair, rejected of the first pair, chosen of the second, ..."""
    pair_index: Tensor
    """[T] int64 in [0, B)."""
    is_chosen: Tensor
    """[T] bool."""
    reference_logps: Tensor
    """[T] float32."""
    targets: TeacherTargets
    """The stored teacher distributions, T rows."""
    n_pairs: int
    pair_rows: tuple[int, ...] | None = None
    """Rows of each pair, known without reading a tensor; None after `take`."""

    def to(self, device: torch.device | str) -> PairBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> PairBatch:
        """The batch in pinned memory, for asynchronous copies to a GPU; the batch itself on a machine without one."""
        return self._each(Tensor.pin_memory) if torch.cuda.is_available() else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        def changed(part: Any) -> dict[str, Any]:
            return {name: change(value) for name, value in vars(part).items() if isinstance(value, Tensor)}

        inputs = replace(self.inputs, **changed(self.inputs))
        targets = replace(self.targets, **changed(self.targets))
        return replace(self, inputs=inputs, targets=targets, **changed(self))

    def take(self, rows: slice) -> PairBatch:
        """The batch with some of its T rows only; inputs and n_pairs stay."""
        taken: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, targets=self.targets.take(rows), pair_rows=None, **taken)


class TrainingSet:
    """The pairs of a written training set, in order of pair_id."""

    def __init__(self, folder: Path, pad_id: int | None = None):
        """Batches are packed, or padded with `pad_id` if one is given, for a model that cannot be packed.

        Raises FileNotFoundError when `folder` holds no whole training set."""
        self.files, self.pad_id = PairFiles(folder), pad_id
        self.n_tokens = self.files.n_tokens
        """[pairs, 2] int32: response tokens of chosen and rejected."""
        if pad_id is None:
            self.n_inputs = self.files.n_prompt[:, 0] + self.n_tokens.sum(1, dtype=np.int32) - 2
        else:
            self.n_inputs = 2 * (self.files.n_prompt[:, 0] + self.n_tokens.max(1))
        """[pairs] int32: tokens of a pair that go through the student. Packed, its prompt once and all but the last
        token of each response; padded, two sequences as long as the longer one."""

    def __len__(self) -> int:
        return self.files.n_pairs

    def denominators(self, pairs: np.ndarray) -> Denominators:
        """Counts of an optimizer step that uses `pairs`."""
        chosen, rejected = self.n_tokens[pairs].sum(0, dtype=np.int64)
        return Denominators(pairs=len(pairs), chosen_tokens=int(chosen), rejected_tokens=int(rejected))

    def pair_id(self, pair: int) -> str:
        return self.files.pair_id(pair)

    def batch(self, pairs: Sequence[int] | np.ndarray) -> PairBatch:
        """The tensors of `pairs`."""
        pairs = np.asarray(pairs, dtype=np.int64)
        found = [self.files.read(number) for number in self.files.numbers[pairs].ravel()]  # 2B responses
        token_ids, reference = (
            torch.from_numpy(np.concatenate([np.zeros(0, dtype), *(r[name] for r in found)]))
            for name, dtype in (("token_ids", np.int64), ("token_logprobs", np.float32))
        )
        n = self.n_tokens[pairs].ravel().astype(np.int64)  # [2B]
        return PairBatch(
            inputs=collate([r["prompt_token_ids"] for r in found], [r["token_ids"] for r in found], self.pad_id),
            token_ids=token_ids,
            pair_index=torch.from_numpy(np.repeat(np.arange(len(n)) // 2, n)),
            is_chosen=torch.from_numpy(np.repeat(np.arange(len(n)) % 2 == 0, n)),
            reference_logps=reference,
            targets=decode(found),
            n_pairs=len(pairs),
            pair_rows=tuple(n.reshape(-1, 2).sum(1).tolist()),
        ).pin()


def prefetch(tasks: Iterable[Callable[[], T]], ahead: int = AHEAD) -> Generator[T, None, None]:
    """The results of `tasks` in order, made by a thread that is at most `ahead` results ahead of the reader.

    The exception of a task is raised here, in its turn. The thread ends with the iterator."""
    ready: queue.Queue = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(item) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for task in tasks:
                if not put((task(), None)):
                    return
            put((None, StopIteration()))
        except BaseException as e:
            put((None, e))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield value
    finally:
        stop.set()
        thread.join()
