"""Sequence parallelism: the ranks of a group share the tokens of one pack (DeepSpeed-Ulysses, arXiv 2309.14509).

Each rank takes an equal part of a pack's inputs through the model, and of its response rows through the LM head. Only
attention needs all tokens: there each rank has all of them for its share of the heads. All ranks of a group have the
same pack, so each knows which rank has which token, and only token vectors are exchanged.

Shapes: n inputs of a pack, l of them on this rank, T response rows, P ranks, D head dimension, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def share(n: int, group: dist.ProcessGroup) -> slice:
    """This rank's contiguous share of n items."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return slice(n * rank // size, n * (rank + 1) // size)


def check_heads(heads: int, key_heads: int, size: int) -> None:
    """Raise ValueError unless the attention heads can be divided among `size` ranks."""
    if heads % size or (key_heads % size and size % key_heads):
        raise ValueError(
            f"training.sequence_parallel={size}: {heads} attention heads and {key_heads} key heads cannot be "
            f"divided evenly; use a divisor of both, or a divisor of {heads} that is a multiple of {key_heads}"
        )


def to_heads(xs: Sequence[Tensor], n: int, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Exchange queries, keys and values: from this rank's tokens with all heads [l, heads, D] to all n tokens with this
    rank's heads [n, heads / P, D].

    If there are fewer heads than ranks (key heads of grouped queries), a head goes to every rank whose queries use
    it."""
    size, own = dist.get_world_size(group), len(xs[0])
    xs = [x if x.shape[1] >= size else x.repeat_interleave(size // x.shape[1], dim=1) for x in xs]
    by_rank = torch.cat([x.unflatten(1, (size, -1)) for x in xs], 2).transpose(0, 1).flatten(0, 1)
    got = _Exchange.apply(by_rank, [own] * size, _parts(n, size), group)  # [n, all heads / P, D]
    return got.split([x.shape[1] // size for x in xs], dim=1)


def to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `to_heads`: [n, heads / P, D] to [l, heads, D]."""
    size, n = dist.get_world_size(group), len(x)
    own = _parts(n, size)[dist.get_rank(group)]
    by_rank = _Exchange.apply(x, _parts(n, size), [own] * size, group)  # [P l, heads / P, D]
    return by_rank.unflatten(0, (size, own)).transpose(0, 1).flatten(1, 2)


def own_rows(hidden: Tensor, rows: Tensor, n: int, group: dist.ProcessGroup) -> Tensor:
    """The hidden states [T / P, H] of this rank's share of `rows` [T], which index the n inputs.

    This rank has `hidden` [l, H], those of its share of the inputs. The others come from the ranks that have them."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    ends = torch.tensor(_parts(n, size), device=rows.device).cumsum(0)
    owner = torch.searchsorted(ends, rows, right=True)  # [T]: the rank that has the hidden state
    wants = torch.arange(size, device=rows.device).repeat_interleave(
        torch.tensor(_parts(len(rows), size), device=rows.device)
    )  # [T]: the rank whose share has the row
    given = owner == rank
    send = hidden.index_select(0, rows[given] - share(n, group).start)
    come = owner[share(len(rows), group)]
    counts = [torch.bincount(x, minlength=size).tolist() for x in (wants[given], come)]
    got = _Exchange.apply(send, *counts, group)  # by owner, and in order of row within each
    return got.index_select(0, come.argsort(stable=True).argsort())


def _parts(n: int, size: int) -> list[int]:
    """Lengths of all ranks' shares."""
    return [n * (r + 1) // size - n * r // size for r in range(size)]


class _Exchange(torch.autograd.Function):
    """All-to-all of rows: the first sent[0] rows of x go to rank 0, the next sent[1] to rank 1, and so on; received[r]
    rows come from rank r. The backward pass sends gradients the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(gradient, *ctx.way_back), None, None, None
