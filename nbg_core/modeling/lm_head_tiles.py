"""The LM head applied to some rows of hidden states at a time: a tile of logits, and the gradients from theirs.

With bf16 and fp16, a CPU upcasts the weight block by block. On CUDA the GEMMs take operands of that dtype (the logits'
gradient is rounded to it) and sum in float32. Where Triton is installed, its kernels make the other passes over a tile
(`lm_head_kernels`).

Shapes: T rows of hidden states, H hidden, V vocabulary, c rows of a tile.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

try:
    from nbg_core.modeling import lm_head_kernels
except ImportError:  # builds of torch for CPUs come without Triton
    lm_head_kernels = None  # type: ignore[assignment]  # a module or nothing

TILE_BYTES = {"cpu": 128 << 20, "cuda": 1280 << 20}
"""Default size of a tile of logits. It is larger on a GPU: for each tile the whole gradient of the weight is read and
written once, which must take less time than the tile's GEMM."""

MIN_ROWS, MIN_COLUMNS = 16, 64
"""Minimum number of rows of a GEMM and of columns of its result. oneDNN then computes each entry with the same order of
summation, whatever the other rows and columns are; for a single row or column it does not."""

CACHE_BYTES = 8 << 20
"""On a CPU, passes over a tile handle rows of about this size at a time, but at least 16 of them: torch reduces a few
long rows 20 times slower than 8 or more."""

WEIGHT_BLOCK_BYTES = 8 << 20
"""Size of the blocks in which a CPU takes the weight: neither a block nor its logits are much larger."""


class LmHeadTiles:
    """Projects rows of `hidden` into one buffer, `tile`, and adds up the gradients of hidden states and weight."""

    def __init__(self, hidden: Tensor, weight: Tensor, vocab: int, tile_bytes: int | None):
        if hidden.shape[1:] != weight.shape[1:] or not 0 < vocab <= len(weight) or hidden.dtype != weight.dtype:
            raise ValueError(
                f"hidden {tuple(hidden.shape)} {hidden.dtype}, weight {tuple(weight.shape)} {weight.dtype} and "
                f"vocab={vocab} do not fit; pass hidden [T, H] and the output matrix [at least vocab, H] of one dtype"
            )
        self.hidden, self.weight, self.on_cpu = hidden, weight[:vocab], hidden.device.type == "cpu"
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.by_onednn = ONEDNN and self.on_cpu and self.dtype == torch.float32
        self.by_kernels = _has_kernels(hidden) and self.dtype == torch.float32
        if tile_bytes is None:
            tile_bytes = TILE_BYTES["cpu" if self.on_cpu else "cuda"]
        self.rows = max(MIN_ROWS, tile_bytes // (vocab * self.dtype.itemsize))

    def allocate(self, chunks: list[slice]) -> list[list[slice]]:
        """The tiles of each chunk, as slices of rows. Allocates `tile` for the longest of them, and `scratch`."""
        tiles = [equal_parts(chunk, self.rows) for chunk in chunks]
        longest = max((t.stop - t.start for some in tiles for t in some), default=0)
        vocab = len(self.weight)
        self.tile = self.hidden.new_empty(max(MIN_ROWS, longest), vocab, dtype=self.dtype)
        if self.by_kernels:
            self.scratch = None
            return tiles
        in_scratch = max(MIN_ROWS, CACHE_BYTES // (vocab * self.dtype.itemsize)) if self.on_cpu else len(self.tile)
        self.scratch = self.tile.new_empty(min(in_scratch, len(self.tile)), vocab)
        return tiles

    def logits(self, rows: slice) -> Tensor:
        """The logits [c, V] of `rows`, in the buffer. Fewer than MIN_ROWS rows are filled up with rows of zeros."""
        h, n = self._operand(rows), max(MIN_ROWS, rows.stop - rows.start)
        if len(h) < n:
            h = torch.cat([h, h.new_zeros(n - len(h), h.shape[1])])
        z = self.tile[:n]
        for block, w in self._weight_blocks(whole=not self.by_onednn):
            if self.by_onednn:
                z[:, block] = linear(h, w)
            else:
                _add_product(z[:, block], h, w.t(), beta=0)
        return z

    def add_gradients(
        self, dz: Tensor, rows: slice, d_hidden: Tensor | None, d_weight: Tensor | None, first: bool
    ) -> None:
        """Add dz W to d_hidden[rows] and dz^T h to d_weight; `first` sets d_weight instead. dz is [at least c, V]."""
        h = self._operand(rows)
        dz = dz[: len(h)].to(h.dtype)
        if d_hidden is not None:
            for block, w in self._weight_blocks():
                if self.by_onednn:
                    d_hidden[rows] += linear(dz[:, block], w.t())
                else:
                    _add_product(d_hidden[rows], dz[:, block], w)
        if d_weight is not None:
            _add_product(d_weight[: dz.shape[1]], dz.t(), h, beta=0 if first else 1)

    def _operand(self, rows: slice) -> Tensor:
        return self.hidden[rows].to(self.tile.dtype) if self.on_cpu else self.hidden[rows]

    def _weight_blocks(self, whole: bool = True) -> Iterator[tuple[slice, Tensor]]:
        """(columns of the logits, rows of the weight) for each GEMM: the whole weight with `whole`, else blocks of it.

        On a CPU, which cannot sum bf16 products in float32, a bf16 or fp16 weight always comes in blocks, upcast one at
        a time."""
        as_it_is = not self.on_cpu or self.weight.dtype == self.tile.dtype
        if as_it_is and whole:
            yield slice(None), self.weight
            return
        vocab, width = self.weight.shape
        size = max(MIN_COLUMNS, WEIGHT_BLOCK_BYTES // (4 * max(width, len(self.tile))))
        buffer = None if as_it_is else self.tile.new_empty(min(size, vocab), width)
        for block in equal_parts(slice(0, vocab), size):
            w = self.weight[block]
            yield block, w if buffer is None else buffer[: len(w)].copy_(w)


def equal_parts(whole: slice, size: int) -> list[slice]:
    """`whole` in parts of at most `size`, as equal as possible."""
    n = whole.stop - whole.start
    parts = -(-n // size)
    return [slice(whole.start + n * i // parts, whole.start + n * (i + 1) // parts) for i in range(parts)]


def _has_kernels(hidden: Tensor) -> bool:
    return hidden.is_cuda and lm_head_kernels is not None and _can_build(hidden.device)


@cache
def _can_build(device: torch.device) -> bool:
    try:
        lm_head_kernels.log_z(torch.zeros(1, 1, device=device), 1.0)
    except Exception as error:  # from Triton, the C compiler or the driver
        warnings.warn(
            "Triton cannot build its kernels here, so torch's operators are used, which are slower; install "
            f"a C compiler and Python's headers ({error})",
            stacklevel=2,
        )
        return False
    return True


def log_sum_exp_of(z: Tensor, scratch: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Log-sum-exp [c] of z / temperature, z [c, V], which is left as it is: by the Triton kernel if `scratch` is None,
    else in blocks of rows that fit `scratch`.

    A block has several rows, because torch sums a single row in another order."""
    if scratch is None:
        return lm_head_kernels.log_z(z, temperature)[1]
    out = []
    for part in z.tensor_split(-(-len(z) // len(scratch))):
        space = scratch[: len(part)]
        x = part if temperature == 1 else torch.div(part, temperature, out=space)
        top = x.amax(-1, keepdim=True)
        out.append(torch.sub(x, top, out=space).exp_().sum(-1).log_() + top[:, 0])
    return torch.cat(out)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x w^T in float32 on a CPU, by oneDNN. It is as fast with few rows as with many; with 150 rows of logits MKL
    reaches 0.6 of its speed. torch has no public function for it; this is the operator that torch.compile uses."""
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], None)


def _has_onednn() -> bool:
    try:
        return linear(torch.ones(2, 2), torch.ones(2, 2)).shape == (2, 2)
    except (AttributeError, RuntimeError):
        return False


ONEDNN = _has_onednn()


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """out = beta * out + a b, summed in the dtype of out, which on CUDA may be wider than that of a and b."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
