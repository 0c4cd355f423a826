"""The head's passes over a tile of logits on a GPU, in Triton: each reads the tile once, where torch's operators take
six passes for a log-sum-exp and seven for a gradient.

A float32 tile z [c, V] is more than a GPU's cache holds: what a pass costs is its bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Entries of a row that are handled at once."""


def log_z(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log sum exp [c] of z [c, V] and of z / temperature, float32, in one pass. A row of -inf gives NaN."""
    cold, hot = (z.new_empty(len(z)) for _ in range(2))
    _log_z[(len(z),)](z, cold, hot, z.stride(0), temperature, VOCAB=z.shape[1], IS_COLD=temperature == 1, BLOCK=BLOCK)
    return cold, hot


def gradient(
    z: Tensor, base: Tensor, scale: Tensor, log_z: Tensor, cold: Tensor, temperature: float, out: Tensor
) -> None:
    """out [c, V] = scale exp(z / temperature - base) + cold exp(z - log_z), with vectors [c]; in float32, then in
    the dtype of `out`, which may be z. The second term is left out at temperature 1."""
    rows, vocab = z.shape
    _gradient[(rows, triton.cdiv(vocab, BLOCK))](
        z, out, base, scale, log_z, cold, vocab, z.stride(0), out.stride(0), temperature, IS_COLD=temperature == 1,
        BLOCK=BLOCK,
    )  # fmt: skip


@triton.jit
def _log_z(z, cold, hot, stride, temperature, VOCAB: tl.constexpr, IS_COLD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    z += row.to(tl.int64) * stride
    # Every lane keeps the greatest logit that it met and its sums below that: one reduction, at the end.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    sum_cold = tl.zeros((BLOCK,), tl.float32)
    sum_hot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        x = tl.load(z + start + columns, mask=start + columns < VOCAB, other=float("-inf"))
        new = tl.maximum(top, x)
        least = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is no number
        sum_cold = sum_cold * tl.exp(top - least) + tl.exp(x - least)
        if not IS_COLD:
            sum_hot = sum_hot * tl.exp((top - least) / temperature) + tl.exp((x - least) / temperature)
        top = new
    best = tl.max(top, 0)
    log_cold = best + tl.log(tl.sum(sum_cold * tl.exp(top - best), 0))
    log_hot = log_cold
    if not IS_COLD:
        log_hot = best / temperature + tl.log(tl.sum(sum_hot * tl.exp((top - best) / temperature), 0))
    tl.store(cold + row, log_cold)
    tl.store(hot + row, log_hot)


@triton.jit
def _gradient(z, out, base, scale, log_z, cold, vocab, stride, out_stride, temperature, IS_COLD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip  # noqa: E501
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    x = tl.load(z + row.to(tl.int64) * stride + columns, mask=inside)
    value = tl.load(scale + row) * tl.exp(x / temperature - tl.load(base + row))
    if not IS_COLD:
        value += tl.load(cold + row) * tl.exp(x - tl.load(log_z + row))
    tl.store(out + row.to(tl.int64) * out_stride + columns, value.to(out.dtype.element_ty), mask=inside)
