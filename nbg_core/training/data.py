"""Batches of pairs: from lake rows to the tensors of one forward pass.

The training set is held in memory, whole, on every rank. Sequences are right-padded, chosen and rejected of a pair
next to each other; only rows that predict response tokens reach the output matrix. Layouts without padding or with a
shared prompt change `TrainingSet.batch` and `models.response_logits`, nothing else: all that follows the hidden
states is per response token.

Shapes: B pairs of a micro-batch, L padded length, T response tokens of all 2B responses behind one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor

from nbg_core.lake import Lake
from nbg_core.losses import Denominators, TeacherTargets
from nbg_core.models import pad
from nbg_core.teacher.store import targets
from nbg_core.training.pairs import read_pairs, read_responses
from nbg_core.training.request import Request


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch; [T] arrays are already shifted: `rows[t]` of the flattened hidden states predicts token t."""

    ids: Tensor
    """[2B, L] int64 prompt and response; chosen and rejected of the first pair, then of the second."""
    mask: Tensor
    """[2B, L] int64: 1 where there is a token."""
    rows: Tensor
    """[T] int64 into 2B * L."""
    token_ids: Tensor
    """[T] int64."""
    pair_index: Tensor
    """[T] int64 in [0, B)."""
    is_chosen: Tensor
    """[T] bool."""
    reference_logps: Tensor
    """[T] float32."""
    targets: TeacherTargets
    """T rows of stored teacher distribution."""
    n_pairs: int

    def to(self, device: torch.device | str) -> PairBatch:
        teacher = TeacherTargets(**{name: tensor.to(device) for name, tensor in vars(self.targets).items()})
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, targets=teacher, **moved)


@dataclass(frozen=True)
class TrainingSet:
    """The pairs, in order of pair_id; `responses` has two rows per pair, chosen first."""

    pair_ids: list[str]
    slices: list[str]
    responses: pl.DataFrame
    n_tokens: np.ndarray
    """[pairs, 2] response tokens of chosen and rejected."""
    n_prompt: np.ndarray
    """[pairs, 2] prompt tokens."""

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def n_inputs(self) -> np.ndarray:
        """[pairs] int64: tokens of a pair that go through the student, its prompt once, last tokens of responses never.

        What a response's last token would predict is not trained on."""
        return self.n_prompt[:, 0] + self.n_tokens.sum(1) - 2

    def denominators(self, pairs: np.ndarray) -> Denominators:
        """Counts of an optimizer step that uses `pairs`."""
        chosen, rejected = self.n_tokens[pairs].sum(0)
        return Denominators(pairs=len(pairs), chosen_tokens=int(chosen), rejected_tokens=int(rejected))

    def tokens(self, pairs: np.ndarray) -> int:
        """Tokens that go through the student for `pairs`, padding not counted."""
        return int(self.n_tokens[pairs].sum() + self.n_prompt[pairs].sum())

    def batch(self, pairs: Sequence[int] | np.ndarray, pad_id: int) -> PairBatch:
        """The tensors of `pairs`. Without pairs: one padding token and T = 0, so that the rank still takes part."""
        pairs = np.asarray(pairs, dtype=np.int64)
        chosen_first = np.stack([2 * pairs, 2 * pairs + 1], 1).ravel()
        rows = self.responses[chosen_first]
        n = self.n_tokens[pairs].ravel()  # [2B]
        pair_index = torch.from_numpy(np.repeat(np.repeat(np.arange(len(pairs)), 2), n))
        is_chosen = torch.from_numpy(np.repeat(np.tile([True, False], len(pairs)), n))
        if len(pairs):
            ids, mask, at = pad(rows["prompt_token_ids"].to_list(), rows["token_ids"].to_list(), pad_id)
        else:
            ids, mask, at = torch.full((1, 1), pad_id), torch.ones((1, 1), dtype=torch.long), torch.zeros(0).long()
        return PairBatch(
            ids, mask, at, _flat(rows, "token_ids").long(), pair_index, is_chosen,
            _flat(rows, "reference_logprobs"), targets(rows), len(pairs),
        )  # fmt: skip


def read_training_set(lake: Lake, request: Request) -> TrainingSet:
    """The training set of a request at its snapshot. Raises TrainingError naming the first pair that does not fit."""
    where = dict(teacher_id=request.teacher_id, storage_id=request.storage_id, reference_id=request.policy_id,
                 scoring_id=request.scoring_id)  # fmt: skip
    pairs = read_pairs(lake, request.snapshot, request.slices, **where)
    responses = read_responses(lake, request.snapshot, request.slices, **where)

    def per_pair(column: str) -> np.ndarray:
        return responses[column].list.len().to_numpy().astype(np.int64).reshape(-1, 2)

    return TrainingSet(
        pairs["pair_id"].to_list(), pairs["slice"].to_list(), responses, per_pair("token_ids"),
        per_pair("prompt_token_ids"),
    )  # fmt: skip


def _flat(rows: pl.DataFrame, column: str) -> Tensor:
    return torch.from_numpy(rows[column].explode(empty_as_null=False).to_numpy().copy())
