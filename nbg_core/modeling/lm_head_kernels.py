"""Triton kernels for the passes of `lm_head` over a tile of logits on a GPU.

Each kernel reads the tile once; torch's operators need six passes for a log-sum-exp and seven for a gradient.
A float32 tile does not fit a GPU's cache, so a pass takes as long as moving its bytes does.

Shapes: c rows of a tile, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits of a row that a program handles at once."""


def log_z(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [c] of z [c, V] and of z / temperature, float32, in one pass. A row of -inf gives NaN."""
    at_one, at_temperature = (z.new_empty(len(z)) for _ in range(2))
    _log_z[(len(z),)](
        z,
        at_one,
        at_temperature,
        z.stride(0),
        temperature,
        VOCAB=z.shape[1],
        TEMPERATURE_IS_ONE=temperature == 1,
        BLOCK=BLOCK,
    )
    return at_one, at_temperature


def gradient(
    z: Tensor, base: Tensor, scale: Tensor, log_z: Tensor, at_one: Tensor, *, temperature: float, out: Tensor
) -> None:
    """out [c, V] = scale exp(z / temperature - base) + at_one exp(z - log_z), where the other tensors are [c].

    Computed in float32 and rounded to the dtype of `out`, which may be z. At temperature 1 the second term is left
    out."""
    rows, vocab = z.shape
    _gradient[(rows, triton.cdiv(vocab, BLOCK))](
        z, out, base, scale, log_z, at_one, vocab, z.stride(0), out.stride(0), temperature,
        TEMPERATURE_IS_ONE=temperature == 1, BLOCK=BLOCK,
    )  # fmt: skip


# One program per row.
@triton.jit
def _log_z(
    z,
    at_one,
    at_temperature,
    stride,
    temperature,
    VOCAB: tl.constexpr,
    TEMPERATURE_IS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    z += row.to(tl.int64) * stride
    # Each of the BLOCK lanes keeps the largest logit that it has met, and sums relative to that. They are reduced once,
    # at the end.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    sum_at_one = tl.zeros((BLOCK,), tl.float32)
    sum_at_temperature = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        x = tl.load(z + start + columns, mask=start + columns < VOCAB, other=float("-inf"))
        new = tl.maximum(top, x)
        least = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
        sum_at_one = sum_at_one * tl.exp(top - least) + tl.exp(x - least)
        if not TEMPERATURE_IS_ONE:
            sum_at_temperature = sum_at_temperature * tl.exp((top - least) / temperature) + tl.exp(
                (x - least) / temperature
            )
        top = new
    best = tl.max(top, 0)
    log_at_one = best + tl.log(tl.sum(sum_at_one * tl.exp(top - best), 0))
    log_at_temperature = log_at_one
    if not TEMPERATURE_IS_ONE:
        log_at_temperature = best / temperature + tl.log(
            tl.sum(sum_at_temperature * tl.exp((top - best) / temperature), 0)
        )
    tl.store(at_one + row, log_at_one)
    tl.store(at_temperature + row, log_at_temperature)


# One program per row and BLOCK columns.
@triton.jit
def _gradient(z, out, base, scale, log_z, at_one, vocab, stride, out_stride, temperature, TEMPERATURE_IS_ONE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip  # noqa: E501
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    x = tl.load(z + row.to(tl.int64) * stride + columns, mask=inside)
    value = tl.load(scale + row) * tl.exp(x / temperature - tl.load(base + row))
    if not TEMPERATURE_IS_ONE:
        value += tl.load(at_one + row) * tl.exp(x - tl.load(log_z + row))
    tl.store(out + row.to(tl.int64) * out_stride + columns, value.to(out.dtype.element_ty), mask=inside)
