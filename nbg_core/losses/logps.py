"""Log-probabilities, in nats, from logits.

Shapes: T response tokens, V vocabulary, K token ids per position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def token_logps(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log p(token_ids) [T] under logits [T, V] at temperature 1. Row t of the logits predicts token t.

    Not reduced; float32, or float64 for float64 logits. Tests call it as the definition. Training and scoring get the
    same numbers from `modeling.lm_head`, which never holds all logits at once."""
    z = upcast(logits)  # [T, V]
    return gather_logps(z, log_sum_exp(z), token_ids[:, None])[:, 0]


def gather_logps(z: Tensor, log_z: Tensor, ids: Tensor) -> Tensor:
    """log p [T, K] at `ids` [T, K] from logits z [T, V] and their log-sum-exp log_z [T, 1]."""
    return z.gather(-1, ids) - log_z


def log_sum_exp(z: Tensor) -> Tensor:
    """log sum exp [T, 1] of logits z [T, V]."""
    return z.logsumexp(-1, keepdim=True)


def upcast(x: Tensor) -> Tensor:
    """`x` in float32; float64 stays float64.

    Losses are not computed in half precision: rounding logits to bfloat16 alone costs 0.02 nats per token."""
    # 8 bytes: float64, without importing torch
    return x if x.dtype.itemsize == 8 else x.float()
