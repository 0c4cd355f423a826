"""The joint loss directly from hidden states: the LM head fused with `losses.joint.joint_loss`.

The logits [T, V] never exist at once. They are computed one tile of rows at a time (`lm_head_tiles`), and their
gradient takes their place. The loss depends on a row of logits only through a few numbers (`logit_stats`): the
log-probs of the row's token and of the stored ids, and the log mass outside the top entries. The loss itself
(`token_divergence`, `pair_loss`) is ordinary autograd on these [T] and [T, K] tensors. Its derivatives with respect to
them, g for the token, a for the stored ids and b for the mass outside, give the gradient dz_v of each logit z_v:

    dz_v = a_v + g [v = token] + b exp(z_v - log_out) [v outside the top entries] - (g + sum a + b) p_v

Here p is the softmax of z, and log_out the log-sum-exp of the logits outside the top entries. For a divergence at
another temperature than 1, the terms of a and b have z / temperature in place of z, and are divided by the temperature.

The derivative g of the DPO loss needs sums over the whole pair, so rows are taken in chunks of whole pairs. A chunk
that fits the tile is projected once (3 GEMMs with both gradients). A pair that does not fit is first read tile by tile
and then projected again for its gradient (4 GEMMs). Gradients are formed in the forward pass, where ZeRO-3 has the
weight gathered. The backward pass multiplies them by the incoming gradient and needs neither the weight nor a tile.

Shapes: T response tokens, H hidden, V vocabulary, K stored entries of the widest position, c rows of a tile. Tiles,
reductions and the sum of the weight's gradient are float32, or float64 for float64 hidden states.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

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
from nbg_core.modeling.lm_head_tiles import LmHeadTiles, log_sum_exp_of
from nbg_core.modeling.logit_stats import LogitStats


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
    pair_rows: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """`losses.joint_loss` of the logits hidden @ weight[:vocab].T: loss, sums, and the tokens' log-probs [T], detached.

    hidden [T, H] (already shifted: row t predicts token_ids[t]) and weight [at least vocab, H] have one dtype; the
    other arguments are those of `joint_loss`. hidden and weight get gradients if they require them, in one backward
    pass only; rows of the weight from `vocab` on get 0. Without rows the loss is 0 and can still be differentiated. If
    all rows are in order of pair_index, a pair that fits the tile costs one GEMM less. `pair_rows` are then the rows of
    each pair; without it they are read from pair_index, and on a GPU that waits for all work before.

    With a group (sequence parallelism), every rank of it must call this, each with its share of the rows of the same
    pairs. Loss and sums are then this rank's shares, to be added over ranks, and rows are projected twice unless all of
    them fit one tile.

    Memory besides inputs and gradients is O(T K), the tile (at most `tile_bytes`, by default TILE_BYTES, or 16 rows),
    and scratch space: on a CPU 8 MiB or 16 rows, on CUDA the tile's gradient in the dtype of hidden, or without Triton
    twice the tile. Raises ValueError when shapes or dtypes do not fit each other."""
    check_rows("hidden", hidden, token_ids, pair_index, is_chosen, reference_logps, targets)
    n, bucket = len(hidden), settings.estimator == "bucket"
    lm_head = LmHeadTiles(hidden.detach(), weight.detach(), vocab, tile_bytes)
    if group is None:
        chunks = _chunks(_rows_of_pairs(pair_index) if pair_rows is None else pair_rows, lm_head.rows)
    else:
        chunks = [slice(0, n)]
    tiles_of = lm_head.allocate(chunks)
    dtype = lm_head.tile.dtype
    wants_hidden, wants_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    d_hidden = torch.zeros_like(hidden, dtype=dtype) if wants_hidden else None
    d_weight = torch.empty_like(weight, dtype=dtype) if wants_weight else None  # filled by the first product
    stats = LogitStats(n, targets, settings.temperature, bucket, lm_head.tile)
    totals = None

    def loss_of(rows: slice, logps: Tensor, entries: Tensor, tail: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        some = targets.take(rows)
        tail = torch.where(some.is_top.sum(-1) == vocab, LOG_TINY, tail)  # nothing is outside: a constant
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
            for tile in reversed(tiles):  # the logits of the last one are still there
                if tile is not tiles[-1]:
                    z = lm_head.logits(tile)
                part = slice(tile.start - chunk.start, tile.stop - chunk.start)
                dz = stats.write_gradient(z, tile, token_ids, g[part], a[part], b[part], lm_head.scratch, hidden.dtype)
                lm_head.add_gradients(dz, tile, d_hidden, d_weight, first)
                del dz  # so that the next one can have its memory
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
    """log p(token_ids) [T] under hidden @ weight[:vocab].T, without gradient, by the reduction of `lm_head_joint_loss`.

    float32, or float64 if hidden is. On a CPU, float32 results are bitwise equal to those of `lm_head_joint_loss` for
    the same hidden state and weight, whatever the other rows and `tile_bytes`, given the same library and number of
    threads. (Observed with oneDNN; no library guarantees it. On CUDA the tile boundaries must be equal too.) A model
    gives slightly different hidden states in a batch of another shape. Raises ValueError when shapes or dtypes do not
    fit each other."""
    if len(hidden) != len(token_ids):
        raise ValueError(f"hidden and token_ids have {len(hidden)} and {len(token_ids)} rows; pass one row per token")
    with torch.no_grad():
        lm_head = LmHeadTiles(hidden.detach(), weight.detach(), vocab, tile_bytes)
        (tiles,) = lm_head.allocate([slice(0, len(hidden))])
        logps = lm_head.tile.new_empty(len(hidden))
        for tile in tiles:
            z = lm_head.logits(tile)
            n = tile.stop - tile.start
            log_z = log_sum_exp_of(z, lm_head.scratch)[:n]
            logps[tile] = z[:n].gather(1, token_ids[tile, None])[:, 0] - log_z
    return logps


def logit_tiles(hidden: Tensor, weight: Tensor, *, vocab: int, tile_bytes: int | None = None) -> Iterator[Tensor]:
    """The logits hidden @ weight[:vocab].T of all rows in order, a tile [c, vocab] at a time, without gradient.

    float32, or float64 if hidden is. A tile may be overwritten; the next one overwrites it."""
    with torch.no_grad():
        lm_head = LmHeadTiles(hidden.detach(), weight.detach(), vocab, tile_bytes)
        (tiles,) = lm_head.allocate([slice(0, len(hidden))])
        for tile in tiles:
            yield lm_head.logits(tile)[: tile.stop - tile.start]


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients by two tensors are known. The backward pass returns the stored gradients themselves and
    forgets them, so it works once: a copy would take as much memory as the weight."""

    @staticmethod
    def forward(ctx, loss: Tensor, hidden: Tensor, weight: Tensor, gradients: list[Tensor | None]) -> Tensor:
        ctx.gradients, ctx.dtype = gradients, hidden.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.gradients:
            raise RuntimeError("the gradients were used by an earlier backward; call lm_head_joint_loss again")
        d_weight, d_hidden = ctx.gradients.pop(), ctx.gradients.pop()
        if incoming.is_cuda:  # multiplies and rounds in one pass
            out = [None if d is None else torch.empty_like(d, dtype=ctx.dtype) for d in (d_hidden, d_weight)]
            d_hidden, d_weight = (
                None if d is None else torch.mul(d, incoming, out=o)
                for d, o in zip((d_hidden, d_weight), out, strict=True)
            )
        elif incoming != 1:  # saves a pass over the weight's gradient
            d_hidden, d_weight = (None if d is None else d.mul_(incoming) for d in (d_hidden, d_weight))
        return None, *(None if d is None else d.to(ctx.dtype) for d in (d_hidden, d_weight)), None


def _derivatives(loss_of, rows: slice, stats: LogitStats) -> tuple[Tensor, Tensor, Tensor]:
    """g, a and b of the module's docstring: derivatives of the loss of the whole pairs in `rows` by the log-probs of
    the tokens, by those of the stored ids, and by the log mass outside the top entries."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (stats.logps[rows], stats.entries(rows), stats.tail(rows))]
        loss, _ = loss_of(rows, *leaves)
        if not loss.requires_grad:  # no term has a weight
            by_token, by_entries, by_tail = (torch.zeros_like(x) for x in leaves)
        else:
            by_token, by_entries, by_tail = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return by_token, by_entries, by_tail


def _rows_of_pairs(pair_index: Tensor) -> list[int]:
    """Number of rows of each pair that has any. Rows that are not in order of pair count as one pair."""
    if (pair_index.diff() < 0).any():
        return [len(pair_index)]
    return pair_index.unique_consecutive(return_counts=True)[1].tolist()


def _chunks(pair_rows: Sequence[int], rows: int) -> list[slice]:
    """Consecutive rows that hold whole pairs, of `pair_rows` rows each: as few chunks as possible of at most `rows`
    rows, and these as even as possible. A longer pair is a chunk by itself."""
    pairs = [slice(end - n, end) for n, end in zip(pair_rows, accumulate(pair_rows), strict=True)]

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
