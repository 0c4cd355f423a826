"""The packed forward pass: no padding is computed, and a prompt is computed once for all responses that share it.

A *tree* is a prompt with one or more branches, its responses; a pair is a tree with two. Trees are concatenated
into one sequence, [prompt | branch 1 | branch 2 | prompt | branch 1 ...]. A branch attends to its prompt and itself,
and its positions continue the prompt's. The last hidden state of a prompt predicts the first token of each branch. The
last token of a branch is left out, since its hidden state would only predict a token after the response.

Models are used unchanged: everything but attention works on each token by itself. Attention is one function in
transformers' AttentionInterface. It gets the layout of the pack as a keyword argument of the model's forward, which
gradient checkpointing passes again when it recomputes a layer. The queries of a pack fall into *segments*, [prompt |
branch 1] and then each further branch alone. A segment attends to [prompt | its branch], causally, with queries and
keys aligned at their ends (bottom right, as in FlashAttention). A mask over the whole sequence is never built. On a CPU
each segment is an attention call of its own: padding segments of similar lengths into batched calls made forward and
backward of a 384-wide model 2 to 11% slower (of a 64-wide one 12 to 38%).

Shapes: L input tokens of a pack; T response tokens of all its branches; M keys of all segments, concatenated; H hidden;
D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nbg_core.modeling.sequence_parallel import own_rows, share, to_heads, to_tokens

MODEL_TYPES = ("gemma3_text", "llama", "qwen2", "qwen3")
"""Architectures whose packed forward pass is tested against one pass per response."""

ATTENTION = "packed_trees"
"""Name of the attention function in transformers. Without a pack it is `sdpa`."""


@dataclass(frozen=True)
class Pack:
    """Trees, concatenated into one sequence."""

    ids: Tensor
    """[1, L] int64."""
    position_ids: Tensor
    """[1, L] int64."""
    rows: Tensor
    """[T] int64 into L: the hidden state of row t predicts response token t, in order of tree, branch, position."""
    keys: Tensor
    """[M] int64 into L: the keys of all segments."""
    segments: tuple[tuple[int, int], ...]
    """Number of queries and of keys of each segment. The queries of all segments are the L inputs, in order."""

    def to(self, device: torch.device | str) -> Pack:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def pack(prompts: Sequence[Sequence[int]], branches: Sequence[Sequence[Sequence[int]]]) -> Pack:
    """The pack of `prompts`, each with its `branches`: token ids as lists or integer arrays.

    Without prompts: one token and T = 0, so that a rank that has nothing to do still takes part. Raises ValueError
    naming the tree if a prompt or a branch has no tokens, or a prompt no branches."""
    if not len(prompts):
        one = torch.zeros((1, 1), dtype=torch.long)
        return Pack(one, one, one[0, :0], one[0], ((1, 1),))
    for i, (prompt, responses) in enumerate(zip(prompts, branches, strict=True)):
        if not (len(prompt) and len(responses) and all(len(r) for r in responses)):
            raise ValueError(
                f"tree {i} has {len(prompt)} prompt tokens and responses of {[len(r) for r in responses]} tokens; "
                "give every prompt and response at least one token and every prompt a response"
            )
    # The sequence in pieces: a prompt, its branches, the next prompt, ...
    pieces = [
        np.asarray(piece, dtype=np.int64)
        for prompt, responses in zip(prompts, branches, strict=True)
        for piece in (prompt, *(r[:-1] for r in responses))
    ]
    n = np.array([len(piece) for piece in pieces])
    start = n.cumsum() - n
    n_branches = np.array([len(b) for b in branches])  # per tree
    is_branch = np.ones(len(pieces), dtype=bool)
    is_branch[(n_branches + 1).cumsum() - (n_branches + 1)] = False
    # Per branch of any tree: where its prompt and the branch itself start, and how many inputs each of them has.
    prompt_start, branch_start = np.repeat(start[~is_branch], n_branches), start[is_branch]
    n_prompt, n_branch = np.repeat(n[~is_branch], n_branches), n[is_branch]
    offset = np.zeros_like(n)
    offset[is_branch] = n_prompt
    is_first = np.zeros(len(n_branch), dtype=bool)
    is_first[n_branches.cumsum() - n_branches] = True
    n_queries = n_branch + n_prompt * is_first
    used = n_queries > 0  # a further branch of one token has no inputs, so no segment

    def pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([a, b], 1).ravel()

    rows = _ranges(pairs(prompt_start + n_prompt - 1, branch_start), pairs(np.ones_like(n_branch), n_branch))
    keys = _ranges(pairs(prompt_start[used], branch_start[used]), pairs(n_prompt[used], n_branch[used]))
    return Pack(
        torch.from_numpy(np.concatenate(pieces))[None],
        torch.from_numpy(_ranges(offset, n))[None],
        torch.from_numpy(rows),
        torch.from_numpy(keys),
        tuple(zip(n_queries[used].tolist(), (n_prompt + n_branch)[used].tolist(), strict=True)),
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of every range, concatenated."""
    return np.repeat(starts - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum())


def supports_packing(config: PreTrainedConfig) -> bool:
    """Whether `packed_hidden` is tested for models of this configuration."""
    return config.model_type in MODEL_TYPES and not getattr(config, "use_bidirectional_attention", False)


def packed_hidden(model: PreTrainedModel, pack: Pack, group: dist.ProcessGroup | None = None) -> Tensor:
    """Hidden states [T, H] that predict the response tokens of a pack, on the model's device and in its dtype.

    With a group, whose ranks all have this pack, only those of this rank's share of T (`sequence_parallel.share`).
    Sets the model's attention to `ATTENTION`, which in forward passes without a pack is `sdpa`. Raises ValueError if
    the model's architecture is not among `MODEL_TYPES`."""
    if not supports_packing(model.config):
        raise ValueError(
            f"packing is not tested for model type {model.config.model_type!r} with these attention settings; "
            f"use the padded forward pass, or a causal model of {', '.join(MODEL_TYPES)}"
        )
    if model.config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)
    if group is not None:
        pack = _with_inputs(pack, dist.get_world_size(group))
    length = pack.ids.shape[1]
    mine = slice(None) if group is None else share(length, group)
    hidden = model.base_model(
        input_ids=pack.ids[:, mine],
        position_ids=pack.position_ids[:, mine],
        attention_mask=pack.ids.new_ones(1, 1, 1, 1),  # a 4-D mask is taken as it is, and `_attention` does not read it
        use_cache=False,
        packed_layout=_Layout(pack, group),
    ).last_hidden_state
    if group is not None:
        return own_rows(hidden[0], pack.rows, length, group)
    return hidden[0].index_select(0, pack.rows)


def _with_inputs(pack: Pack, least: int) -> Pack:
    """`pack`, with at least `least` inputs: the tokens that are appended are seen by no token of the pack. Each rank of
    a group needs an input, since transformers' models cannot run on none."""
    n = pack.ids.shape[1]
    more = torch.arange(max(0, least - n), device=pack.ids.device)
    if not len(more):
        return pack
    ids, positions = (torch.cat([x, y[None]], 1) for x, y in ((pack.ids, 0 * more), (pack.position_ids, more)))
    segments = (*pack.segments, (len(more), len(more)))
    return replace(pack, ids=ids, position_ids=positions, keys=torch.cat([pack.keys, n + more]), segments=segments)


class _Layout:
    """What attention needs of a pack, made once for all layers."""

    def __init__(self, pack: Pack, group: dist.ProcessGroup | None):
        self.keys, self.segments, self.length, self.group = pack.keys, pack.segments, pack.ids.shape[1], group
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def mask(self, n_queries: int, n_keys: int, window: int) -> Tensor:
        """Which keys a query sees, [n_queries, n_keys] bool: `window` of them, up to its own. The last query's own is
        the last key."""
        shape = n_queries, n_keys, window
        if shape not in self._masks:
            behind = n_keys - n_queries
            seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=self.keys.device)
            self._masks[shape] = seen.tril_(behind).triu_(behind - window + 1)
        return self._masks[shape]

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Cumulative queries and keys [segments + 1] int32, and the maximum of each in a segment, for `varlen_attn`."""
        n = torch.tensor(self.segments, dtype=torch.int32)
        q, k = pad(n.cumsum(0, dtype=torch.int32), (0, 0, 1, 0)).to(self.keys.device).unbind(1)
        return q.contiguous(), k.contiguous(), int(n[:, 0].max()), int(n[:, 1].max())


def _has_varlen(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)  # flash attention has no float32


@torch.compiler.disable  # the rest of a compiled layer, before and after it, is still compiled
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, packed_layout: _Layout | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention for transformers' AttentionInterface: query [1, heads, L, D], key and value [1, key heads, L, D]."""
    if packed_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window,
            softcap=softcap, **kwargs,
        )  # fmt: skip
    if softcap is not None or dropout:
        raise ValueError(f"packed attention has no softcap ({softcap}) and no dropout ({dropout}); switch both off")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [L, heads, D]
    if packed_layout.group is not None:  # from here on L counts all tokens, and heads are this rank's
        q, k, v = to_heads((q, k, v), packed_layout.length, packed_layout.group)
    gqa = q.shape[1] != k.shape[1]
    k, v = (x.index_select(0, packed_layout.keys) for x in (k, v))  # [M, key heads, D]
    out = _by_segment(q, k, v, packed_layout, scaling, sliding_window, gqa)  # [L, heads, D]
    return (out if packed_layout.group is None else to_tokens(out, packed_layout.group))[None], None


def _by_segment(
    q: Tensor, k: Tensor, v: Tensor, layout: _Layout, scaling: float | None, sliding_window: int | None, gqa: bool
) -> Tensor:
    """The output [L, heads, D] of queries [L, heads, D], keys and values [M, key heads, D]."""
    if _has_varlen(q):
        # Flash attention aligns the ends of queries and keys (pytorch PR 193630). This has run on a GPU with torch
        # 2.11, where grouped queries need no argument; with torch 2.13 only the arguments are tested.
        seen = (-1 if sliding_window is None else sliding_window - 1, 0)
        out = varlen_attn(q, k, v, *layout.bounds, scale=scaling, window_size=seen, enable_gqa=gqa)
        return cast(Tensor, out)  # a tuple only if more than the output is asked for
    n_queries, n_keys = zip(*layout.segments, strict=True)
    outputs = []
    for segment in zip(q.split(n_queries), k.split(n_keys), v.split(n_keys), strict=True):
        qs, ks, vs = (x.transpose(0, 1)[None] for x in segment)  # [1, heads, n or m, D]
        n, m = qs.shape[2], ks.shape[2]
        window = m if sliding_window is None else sliding_window
        if n < m <= min(2 * n, window):
            # SDPA aligns starts, not ends. Queries of zeros in the place of the prompt's make the segment causal. Half
            # of m x m then costs no more than n x m with a mask, and there is no mask for autograd to keep.
            qs = pad(qs, (0, 0, m - n, 0))
        is_causal = qs.shape[2] == m <= window
        mask = None if is_causal else layout.mask(n, m, window)
        o = scaled_dot_product_attention(qs, ks, vs, mask, is_causal=is_causal, scale=scaling, enable_gqa=gqa)
        outputs.append(o[0, :, -n:].transpose(0, 1))
    return torch.cat(outputs)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
