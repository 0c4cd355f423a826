"""Which pairs each optimizer step uses, and on which rank: a pure function of the settings, known before training.

Because every rank knows the whole plan, the denominators of a step (pairs, chosen tokens, rejected tokens over all
ranks and accumulation) are counted, not communicated, and a run that was cut off continues with the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nbg_core.config import TrainingSettings
from nbg_core.ids import seed_from


@dataclass(frozen=True)
class Step:
    """One optimizer step: 0-based `index`, 0-based pass over the data, and its pairs (positions in the data)."""

    index: int
    epoch: int
    pairs: np.ndarray


def plan(n_pairs: int, settings: TrainingSettings) -> list[Step]:
    """The optimizer steps of a training. Each epoch is a new order of all pairs; its last batch may be smaller.

    Raises ValueError without pairs."""
    if n_pairs == 0:
        raise ValueError("there are no pairs to train on; lower preference.min_margin, or sample more responses")
    steps: list[Step] = []
    for epoch in range(settings.epochs):
        generator = np.random.Generator(np.random.Philox(key=seed_from("order", settings.seed, epoch)))
        order = generator.permutation(n_pairs)
        for start in range(0, n_pairs, settings.global_batch_pairs):
            if settings.max_steps is not None and len(steps) == settings.max_steps:
                return steps
            steps.append(Step(len(steps), epoch, order[start : start + settings.global_batch_pairs]))
    return steps


def accumulation(settings: TrainingSettings, world_size: int) -> int:
    """Micro-batches per rank and optimizer step; the same for all ranks and steps, or collectives would wait."""
    return -(-settings.global_batch_pairs // (settings.micro_batch_pairs * world_size))


def micro_batches(step: Step, settings: TrainingSettings, rank: int, world_size: int) -> list[np.ndarray]:
    """A rank's share of a step: `accumulation` arrays of pairs, even in size, some empty when pairs are few."""
    n = accumulation(settings, world_size)
    return np.array_split(step.pairs, n * world_size)[rank * n : (rank + 1) * n]
