"""The padded forward pass, for any architecture.

Shapes: N sequences, L padded length, T response tokens of all sequences, concatenated, H hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)


@dataclass(frozen=True)
class Padded:
    """Right-padded sequences, and where their response tokens are predicted."""

    ids: Tensor
    """[N, L] int64."""
    mask: Tensor
    """[N, L] int64: 1 for a token, 0 for padding."""
    rows: Tensor
    """[T] int64 into N * L: row p - 1 + r of a sequence with p prompt tokens predicts its response token r; in order
    of sequence, then position."""

    def to(self, device: torch.device | str) -> Padded:
        return Padded(self.ids.to(device), self.mask.to(device), self.rows.to(device))


def pad(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int) -> Padded:
    """One sequence per response, its prompt first: a prompt is computed as often as it has responses.

    Without responses: one token, and no rows."""
    if len(responses) == 0:
        return Padded(torch.full((1, 1), pad_id), torch.ones((1, 1), dtype=torch.long), torch.zeros(0).long())
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), length), dtype=torch.long)
    rows = []
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        n = len(p) + len(r)
        ids[i, :n] = torch.tensor([*p, *r])
        mask[i, :n] = 1
        rows.append(torch.arange(i * length + len(p) - 1, i * length + n - 1))
    return Padded(ids, mask, torch.cat(rows))


def padded_hidden(model: PreTrainedModel, inputs: Padded) -> Tensor:
    """Hidden states [T, H] that predict the response tokens: those at `inputs.rows`."""
    hidden = model.base_model(input_ids=inputs.ids, attention_mask=inputs.mask, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[inputs.rows]
