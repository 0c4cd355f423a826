"""The joint loss straight from hidden states: the output matrix and `losses.joint_loss` in one, never [T, V] at once.

Logits live in one tile of a bounded number of rows, which is turned into their gradient in place. The loss sees a row
through a few numbers only: the log-probs of its token and of the stored ids, and the log mass outside the head. So the
loss proper (`losses.token_divergence`, `losses.pair_loss`) runs on [T] and [T, K] vectors with plain autograd; its
derivatives by those numbers give the gradient of each logit in closed form:

    dz_v = a_v + g [v = token] + b exp(z_v - log_out) [v outside the head] - (g + sum a + b) p_v

(a by the entries' log-probs, b by the tail's, g by the token's; all but g at the divergence's temperature).

DPO's g needs the sums of the whole pair. Rows are taken in chunks of whole pairs: a chunk that fits the tile is
projected once (3 GEMMs with both gradients); a pair that does not fit is read tile by tile first and projected again
for its gradient (4 GEMMs). Gradients are formed in the forward pass, where ZeRO-3 has the weight gathered, and the
backward multiplies them by the incoming gradient: it needs neither the weight nor a tile.

Shapes: T response tokens, H hidden, V vocabulary, K stored entries, c rows of a tile. Tiles, reductions and the sum of
the weight's gradient are float32, float64 for float64 hidden states. bf16 and fp16: on a CPU the weight is upcast block
by block; on CUDA the GEMMs take low-precision operands (the logits' gradient is rounded to them) and sum in float32,
and where Triton is, the passes over a tile are its kernels (`head_kernels`).
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from nbg_core.losses.divergence import LOG_TINY
from nbg_core.losses.joint import (
    Denominators,
    check_rows,
    pair_loss,
    share_of_group,
    side_sums,
    weighted,
)
from nbg_core.losses.settings import LossSettings
from nbg_core.losses.targets import TeacherTargets
from nbg_core.losses.token_divergence import token_divergence

try:
    from nbg_core.modeling import lm_head_kernels
except ImportError:  # builds of torch for CPUs come without Triton
    head_kernels = None

TILE_BYTES = {"cpu": 128 << 20, "cuda": 1280 << 20}
"""On a GPU every tile adds to the weight's gradient in its memory, which must cost less than the GEMM."""
MIN_ROWS, MIN_COLUMNS = 16, 64
"""Rows of a GEMM and columns of its result, at least: oneDNN sums every entry in the same order whatever is beside it,
but for a row or column alone."""
CACHE_BYTES = 8 << 20
"""Passes over a tile go by blocks of rows of about this size, but of 16 rows at least: torch reduces few long rows 20
times slower than 8 or more."""
WEIGHT_BLOCK_BYTES = 8 << 20
"""On a CPU the logits of a tile come by blocks of the weight: of about this size, as the block's logits are."""


def lm_head_joint_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    pair_index: Tensor,
    is_chosen: Tensor,
    reference_logps: Tensor,
    targets: TeacherTargets,
    n_pairs: int,
    *,
    vocab: int,
    settings: LossSettings,
    denominators: Denominators,
    group: dist.ProcessGroup | None = None,
    tile_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """`losses.joint_loss` of the logits hidden @ weight[:vocab].T: loss, sums, and the tokens' log-probs [T], detached.

    hidden [T, H] (already shifted: row t predicts token_ids[t]) and weight [rows >= vocab, H], of one dtype; the rest
    as for `joint_loss`. The loss can be differentiated once by hidden and weight, those that require a gradient; rows
    of the weight from `vocab` on get 0. Without rows the loss is a zero that can be differentiated. A pair whose rows
    lie together, in order of pair_index, and fit `tile_bytes` costs one GEMM less.
    With a group, the rows of all its ranks together are those of whole pairs, and every rank of it calls this: loss and
    sums are then its share, which add up over ranks, and rows are projected twice.
    Memory besides inputs and gradients: the tile (at most `tile_bytes`, else TILE_BYTES, or 16 rows), a block of it
    (8 MiB or 16 rows; on CUDA its gradient in the dtype of hidden, or without Triton the tile twice more), and O(T K).
    Raises ValueError when shapes or dtypes do not fit each other."""
    check_rows("hidden", hidden, token_ids, pair_index, is_chosen, reference_logps, targets)
    n, bucket = len(hidden), settings.estimator == "bucket"
    lm_head = _LmHead(hidden.detach(), weight.detach(), vocab, tile_bytes)
    chunks = _chunks(pair_index, lm_head.rows) if group is None else [slice(0, n)]
    tiles_of = lm_head.allocate(chunks)
    dtype = lm_head.tile.dtype
    wants_hidden, wants_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    d_hidden = torch.zeros_like(hidden, dtype=dtype) if wants_hidden else None
    d_weight = torch.empty_like(weight, dtype=dtype) if wants_weight else None  # its first product fills it
    stats = LogitStats(n, targets, settings.temperature, bucket, lm_head.tile)
    totals = None

    def loss_of(rows: slice, logps: Tensor, entries: Tensor, tail: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        some = targets.take(rows)
        tail = torch.where(some.is_top.sum(-1) == vocab, LOG_TINY, tail)  # nothing outside the head: a constant
        kl = token_divergence(entries, tail, some, is_chosen[rows], settings)
        return pair_loss(
            logps, kl, pair_index[rows], is_chosen[rows], reference_logps[rows], n_pairs, settings=settings,
            denominators=denominators, totals=totals,
        )  # fmt: skip

    with torch.no_grad():
        if d_weight is not None:
            d_weight[vocab if n else 0 :].zero_()
        first = True
        for chunk, tiles in zip(chunks, tiles_of, strict=True):
            for tile in tiles:
                z = lm_head.logits(tile)
                stats.read(z, tile, token_ids, lm_head.scratch)
            if group is not None:
                totals = side_sums(stats.logps, reference_logps, pair_index, is_chosen, n_pairs)
                dist.all_reduce(totals, group=group)
            if not (wants_hidden or wants_weight):
                continue
            g, a, b = _derivatives(loss_of, chunk, stats)
            for tile in reversed(tiles):  # the last one is still there
                if tile is not tiles[-1]:
                    z = lm_head.logits(tile)
                part = slice(tile.start - chunk.start, tile.stop - chunk.start)
                dz = stats.write_gradient(z, tile, token_ids, g[part], a[part], b[part], lm_head.scratch, hidden.dtype)
                lm_head.add_gradients(dz, tile, d_hidden, d_weight, first)
                del dz  # the next one takes its place
                first = False
        loss, sums = loss_of(slice(0, n), stats.logps, stats.entries(), stats.tail())
        if group is not None:  # sums over whole pairs are the same on all ranks
            sums = share_of_group(sums, dist.get_world_size(group))
            loss = weighted(sums, settings, denominators).to(loss.dtype)
    if wants_hidden or wants_weight:
        loss = _WithGradients.apply(loss, hidden, weight, [d_hidden, d_weight])
    return loss, sums, stats.logps


def lm_head_logps(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, vocab: int, tile_bytes: int | None = None
) -> Tensor:
    """log p(token_ids) [T] under hidden @ weight[:vocab].T, without gradient: the reduction of `lm_head_joint_loss`.

    float32, or float64 if hidden is. On a CPU equal float32 rows and weights give the very numbers that
    `lm_head_joint_loss` has, whatever the other rows, their number and `tile_bytes`, with the same library and count of
    threads (seen with oneDNN; no library promises it). On CUDA it takes the same tile boundaries too. Hidden states of
    a batch of another shape are themselves other numbers. Raises ValueError when shapes or dtypes do not fit each
    other."""
    if len(hidden) != len(token_ids):
        raise ValueError(f"hidden and token_ids have {len(hidden)} and {len(token_ids)} rows; pass one row per token")
    with torch.no_grad():
        lm_head = _LmHead(hidden.detach(), weight.detach(), vocab, tile_bytes)
        (tiles,) = lm_head.allocate([slice(0, len(hidden))])
        logps = lm_head.tile.new_empty(len(hidden))
        for tile in tiles:
            z = lm_head.logits(tile)
            n = tile.stop - tile.start
            log_z = _log_z(z, lm_head.scratch)[:n]
            logps[tile] = z[:n].gather(1, token_ids[tile, None])[:, 0] - log_z
    return logps


def logit_tiles(hidden: Tensor, weight: Tensor, *, vocab: int, tile_bytes: int | None = None) -> Iterator[Tensor]:
    """The logits hidden @ weight[:vocab].T of all rows behind one another, a tile [c, vocab] at a time; float32, or
    float64 if hidden is; without gradient. A tile may be overwritten; the next one is in its place."""
    with torch.no_grad():
        lm_head = _LmHead(hidden.detach(), weight.detach(), vocab, tile_bytes)
        (tiles,) = lm_head.allocate([slice(0, len(hidden))])
        for tile in tiles:
            yield lm_head.logits(tile)[: tile.stop - tile.start]


class _LmHead:
    """The projection of rows of `hidden` into one reused tile, and the way back."""

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
        """The tiles of each chunk; makes `tile` as long as the longest of them."""
        tiles = [_parts(chunk, self.rows) for chunk in chunks]
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
        """The tile [c, V] with the logits of `rows`; zero rows are added up to MIN_ROWS."""
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
        """Add dz W to rows of d_hidden and dz^T h to d_weight, or with `first` set it; dz [at least c, V]."""
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
        """The weight as the GEMMs take it: whole if that is asked for, but on a CPU, which has no float32 sum of bf16,
        upcast a block at a time."""
        as_it_is = not self.on_cpu or self.weight.dtype == self.tile.dtype
        if as_it_is and whole:
            yield slice(None), self.weight
            return
        vocab, width = self.weight.shape
        size = max(MIN_COLUMNS, WEIGHT_BLOCK_BYTES // (4 * max(width, len(self.tile))))
        buffer = None if as_it_is else self.tile.new_empty(min(size, vocab), width)
        for block in _parts(slice(0, vocab), size):
            w = self.weight[block]
            yield block, w if buffer is None else buffer[: len(w)].copy_(w)


class LogitStats:
    """What the loss sees of each row's logits, and the logits' gradient from the loss's derivatives by that."""

    def __init__(self, n: int, targets: TeacherTargets, temperature: float, bucket: bool, like: Tensor):
        self.targets, self.temperature, self.bucket = targets, temperature, bucket
        self.at_ids = like.new_empty(targets.ids.shape)  # [T, K] logits
        # [T] each: the token's log-prob; log sum exp of the logits, of those / temperature, of the latter outside head
        self.logps, self.log_z, self.log_z_tempered, self.log_out = (like.new_zeros(n) for _ in range(4))

    def entries(self, rows: slice = slice(None)) -> Tensor:
        """log p [., K] at the stored ids, at the temperature."""
        return self.at_ids[rows] / self.temperature - self.log_z_tempered[rows, None]

    def tail(self, rows: slice = slice(None)) -> Tensor:
        """log of the mass [.] outside the head, at the temperature; without meaning unless bucket."""
        return self.log_out[rows] - self.log_z_tempered[rows]

    def read(self, z: Tensor, rows: slice, token_ids: Tensor, scratch: Tensor | None) -> None:
        """Read logits z [c, V]; with bucket, head entries of z are lost."""
        n = rows.stop - rows.start
        if scratch is None:
            self.log_z[rows], self.log_z_tempered[rows] = lm_head_kernels.log_z(z[:n], self.temperature)
        else:
            self.log_z[rows] = _log_z(z, scratch)[:n]
            self.log_z_tempered[rows] = (
                self.log_z[rows] if self.temperature == 1 else _log_z(z, scratch, self.temperature)[:n]
            )
        self.logps[rows] = z[:n].gather(1, token_ids[rows, None])[:, 0] - self.log_z[rows]
        self.at_ids[rows] = z[:n].gather(1, self.targets.ids[rows])
        if self.bucket:
            self._hide_head(z[:n], rows)
            # A row that is all head has no such mass, but a number here: its tail is LOG_TINY instead.
            all_head = self.targets.is_top[rows].sum(-1) == z.shape[1]
            log_out = _log_z(z, scratch, self.temperature)[:n]
            self.log_out[rows] = torch.where(all_head, self.log_z_tempered[rows], log_out)

    def _hide_head(self, z: Tensor, rows: slice) -> None:
        """Set head entries of z to -inf. Slots of `ids` that are no head entries may have their ids: they change
        nothing."""
        most = torch.where(self.targets.is_top[rows], -torch.inf, torch.inf).to(z.dtype)
        z.scatter_reduce_(1, self.targets.ids[rows], most, "amin")

    def write_gradient(
        self, z: Tensor, rows: slice, token_ids: Tensor, g: Tensor, a: Tensor, b: Tensor, scratch: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """The loss's gradient [c, V] by logits z (as projected, or as `read` left them), whose values are lost: in z
        itself, or by kernels in `dtype`.

        g [c], a [c, K], b [c]: derivatives by the token's, the entries' and the tail's log-probs."""
        n, temperature = rows.stop - rows.start, self.temperature
        z, ids = z[:n], self.targets.ids[rows]
        log_z, log_z_tempered, log_out = (x[rows, None] for x in (self.log_z, self.log_z_tempered, self.log_out))
        at_one, at_temperature = -g[:, None], -(a.sum(-1) + b)[:, None]  # of p at temperature 1 and at the divergence's
        # One exp for p and p outside the head: log_out <= log_z_tempered, so nothing overflows, however small the tail.
        base, scale = (
            (log_out, b[:, None] + at_temperature * (log_out - log_z_tempered).exp())
            if self.bucket
            else (log_z_tempered, at_temperature)
        )
        if temperature == 1:
            scale = scale + at_one * (base - log_z).exp()
        scale = scale / temperature
        dz = z
        if self.bucket:
            self._hide_head(z, rows)
        if scratch is None:
            dz = z if dtype == z.dtype else z.new_empty(z.shape, dtype=dtype)
            base_c, scale_c, log_z_c, at_one_c = (x[:, 0].contiguous() for x in (base, scale, log_z, at_one))  # [c]
            lm_head_kernels.gradient(z, base_c, scale_c, log_z_c, at_one_c, temperature, dz)
            if dz is not z:  # z still has the logits; entries that more is added to become gradients there, in float32
                touched = torch.cat([ids, token_ids[rows, None]], 1)
                logits = z.gather(1, touched)
                plain = 0 if temperature == 1 else at_one * (logits - log_z).exp()
                z.scatter_(1, touched, scale * (logits / temperature - base).exp() + plain)
        else:
            for start in range(0, n, len(scratch)):
                block = slice(start, min(start + len(scratch), n))
                part = z[block]
                if temperature != 1:
                    plain = torch.sub(part, log_z[block], out=scratch[: len(part)]).exp_().mul_(at_one[block])
                    part.div_(temperature)
                part.sub_(base[block]).exp_().mul_(scale[block])
                if temperature != 1:
                    part.add_(plain)
        more = a / temperature
        if self.bucket:  # head entries have no part in the tail: there is nothing yet
            at_ids = self.at_ids[rows]
            more = (
                more
                + at_temperature / temperature * (at_ids / temperature - log_z_tempered).exp()
                + at_one * (at_ids - log_z).exp()
            )
            more = torch.where(self.targets.is_top[rows], more, 0.0)
        z.scatter_add_(1, ids, more)
        z.scatter_add_(1, token_ids[rows, None], g[:, None])
        if dz is not z:
            dz.scatter_(1, touched, z.gather(1, touched).to(dtype))
        return dz


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients by two tensors are known. They are given away in the backward: a copy of the weight's
    gradient would cost as much memory as the weight."""

    @staticmethod
    def forward(ctx, loss: Tensor, hidden: Tensor, weight: Tensor, gradients: list[Tensor | None]) -> Tensor:
        ctx.gradients, ctx.dtype = gradients, hidden.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.gradients:
            raise RuntimeError("the head's gradients were used by an earlier backward; call lm_head_joint_loss again")
        d_weight, d_hidden = ctx.gradients.pop(), ctx.gradients.pop()
        if incoming.is_cuda:  # rounded in the same pass
            out = [None if d is None else torch.empty_like(d, dtype=ctx.dtype) for d in (d_hidden, d_weight)]
            d_hidden, d_weight = (
                None if d is None else torch.mul(d, incoming, out=o)
                for d, o in zip((d_hidden, d_weight), out, strict=True)
            )
        elif incoming != 1:  # a pass over the weight's gradient is worth a look
            d_hidden, d_weight = (None if d is None else d.mul_(incoming) for d in (d_hidden, d_weight))
        return None, *(None if d is None else d.to(ctx.dtype) for d in (d_hidden, d_weight)), None


def _derivatives(loss_of, rows: slice, stats: LogitStats) -> tuple[Tensor, Tensor, Tensor]:
    """Of the loss of whole pairs by the token's [c], the entries' [c, K] and the tail's [c] log-probs."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (stats.logps[rows], stats.entries(rows), stats.tail(rows))]
        loss, _ = loss_of(rows, *leaves)
        if not loss.requires_grad:  # no term has a weight
            by_token, by_entries, by_tail = (torch.zeros_like(x) for x in leaves)
        else:
            by_token, by_entries, by_tail = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return by_token, by_entries, by_tail


def _chunks(pair_index: Tensor, rows: int) -> list[slice]:
    """Consecutive rows that hold whole pairs: the fewest chunks of at most `rows`, or of one pair, that is longer, and
    of these the most even ones; all rows when they are not in order of pair."""
    steps, n = pair_index.diff(), len(pair_index)
    ends = [] if (steps < 0).any() else (steps.nonzero()[:, 0] + 1).tolist()
    pairs = [slice(*bounds) for bounds in pairwise([0, *ends, n])] if n else []

    def filled(limit: int) -> list[slice]:
        chunks: list[slice] = []
        for pair in pairs:
            if chunks and pair.stop - chunks[-1].start <= limit:
                chunks[-1] = slice(chunks[-1].start, pair.stop)
            else:
                chunks.append(pair)
        return chunks

    fewest = len(filled(rows))
    return filled(1 + bisect_left(range(1, rows), True, key=lambda limit: len(filled(limit)) <= fewest))


def _parts(whole: slice, size: int) -> list[slice]:
    """The whole in equal parts of at most `size`."""
    n = whole.stop - whole.start
    parts = -(-n // size)
    return [slice(whole.start + n * i // parts, whole.start + n * (i + 1) // parts) for i in range(parts)]


def _has_kernels(hidden: Tensor) -> bool:
    return hidden.is_cuda and lm_head_kernels is not None and _can_build(hidden.device)


@cache
def _can_build(device: torch.device) -> bool:
    try:
        lm_head_kernels.log_z(torch.zeros(1, 1, device=device), 1.0)
    except Exception as error:  # of Triton, the C compiler or the driver
        warnings.warn(
            "Triton cannot build its kernels here, so torch's operators pass over the logits, which is slower; install "
            f"a C compiler and Python's headers ({error})",
            stacklevel=2,
        )
        return False
    return True


def _log_z(z: Tensor, scratch: Tensor | None, temperature: float = 1.0) -> Tensor:
    """log sum exp [c] of z / temperature [c, V], by blocks of rows that fit `scratch`, or without one by kernels; z
    stays as it is.

    Blocks have several rows: torch sums a single one in another order."""
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
    """x w^T, float32 on a CPU. By oneDNN, which is as fast with few rows as with many; MKL reaches 0.6 of that with 150
    rows of logits. torch has no public way to it: this is the operator that its compiler takes."""
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
