"""The stored teacher distribution: an exact head and systematic samples of the tail, per response position.

The head is the smallest set of top entries that leaves at most `epsilon` outside, up to `k_head`. If more than
`epsilon` is left, `m_tail` ids are drawn from it by systematic sampling (one uniform number per position, seeded by
sample and position), each standing for tail mass / m_tail: the cross-entropy against these weights is an unbiased
estimate of that against the whole distribution (random-sampling distillation, arXiv 2503.16870, stratified here).
The mass outside the head is exact: a logsumexp over what is outside, never 1 - sum.

Shapes: T response positions, V vocabulary, K entries of the widest position.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from nbg_core.config import TeacherSettings
from nbg_core.ids import seed_from
from nbg_core.losses import TeacherTargets, token_logps

COLUMNS = ("head_counts", "tail_counts", "tail_logmass", "entry_ids", "entry_logprobs")
"""Columns of teacher_logits that hold the distribution."""

BLOCK_ELEMENTS = 1 << 24
"""Logits handled at once, so that memory does not grow with T x V."""


def compress(
    logits: Tensor, token_ids: Tensor, lengths: list[int], samples: list[str], s: TeacherSettings
) -> pl.DataFrame:
    """The teacher_logits columns of one forward pass, a row per sample.

    logits [T, V] float32, row t predicts token_ids [T]; `lengths` sum to T, one per sample id. Raises ValueError when
    a logit is NaN or +inf, naming the sample."""
    uniforms = np.concatenate([_uniforms(sample, n, s.seed) for sample, n in zip(samples, lengths, strict=True)])
    step = max(1, BLOCK_ELEMENTS // logits.shape[1])
    parts = [
        _compress_block(logits[i : i + step], token_ids[i : i + step], uniforms[i : i + step], s)
        for i in range(0, len(logits), step)
    ]
    token, tail, n_head, n_tail, ids, logprobs = (np.concatenate(p) for p in zip(*parts, strict=True))
    ends = np.cumsum(lengths)
    if np.isnan(token).any() or np.isnan(tail).any():
        bad = int(np.searchsorted(ends, np.flatnonzero(np.isnan(token) | np.isnan(tail))[0], side="right"))
        raise ValueError(
            f"the teacher's logits for sample {samples[bad]} are not numbers; check the teacher's weights and dtype"
        )
    entry_ends = np.cumsum(n_head + n_tail)[ends - 1]
    return pl.DataFrame({
        "sample_id": samples,
        "token_logprobs": _lists(token, ends),
        "tail_logmass": _lists(tail, ends),
        "head_counts": _lists(n_head.astype(np.int32), ends),
        "tail_counts": _lists(n_tail.astype(np.int32), ends),
        "entry_ids": _lists(ids.astype(np.int32), entry_ends),
        "entry_logprobs": _lists(logprobs, entry_ends),
    })  # fmt: skip


def targets(rows: pl.DataFrame) -> TeacherTargets:
    """TeacherTargets over the positions of `rows` (teacher_logits columns) behind one another, in row order."""
    return targets_of(**{c: rows[c].explode(empty_as_null=False).to_numpy() for c in COLUMNS})


def targets_of(
    head_counts: np.ndarray, tail_counts: np.ndarray, tail_logmass: np.ndarray, entry_ids: np.ndarray,
    entry_logprobs: np.ndarray,
) -> TeacherTargets:  # fmt: skip
    """TeacherTargets of T positions from flat columns: the first three [T], the entries behind one another."""
    n_head, count = head_counts.astype(np.int64), head_counts.astype(np.int64) + tail_counts
    width = int(count.max(initial=1))
    position = np.repeat(np.arange(len(count)), count)
    column = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    ids = np.zeros((len(count), width), dtype=np.int64)
    logprobs = np.zeros((len(count), width), dtype=np.float32)
    ids[position, column] = entry_ids
    logprobs[position, column] = entry_logprobs
    columns = np.arange(width)
    is_head = columns < n_head[:, None]
    is_tail = ~is_head & (columns < count[:, None])
    arrays = (ids, logprobs, is_head, is_tail, tail_logmass.astype(np.float32))
    return TeacherTargets(*(torch.from_numpy(a.copy()) for a in arrays))


def _lists(flat: np.ndarray, ends: np.ndarray) -> pl.Series:
    """Rows flat[ends[i - 1] : ends[i]] as a list column, without a copy per row."""
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(offsets, pa.array(flat))))


def _uniforms(sample: str, n: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed_from("tail", seed, sample))).random(n)


def _compress_block(logits: Tensor, token_ids: Tensor, uniforms: np.ndarray, s: TeacherSettings):
    scaled = logits / s.temperature
    logp = scaled.log_softmax(-1)
    k = min(s.k_head, logp.shape[1])
    top = logp.topk(k, dim=-1)
    outside = 1 - top.values.double().exp().cumsum(-1)  # [T, k]: mass left by the first j + 1 entries
    enough = outside <= s.epsilon
    n_head = torch.where(enough.any(-1), enough.int().argmax(-1) + 1, k)  # [T]
    kept = torch.arange(k, device=logp.device) < n_head[:, None]
    kept &= top.values > -torch.inf  # an impossible token is not an entry
    in_head = torch.zeros_like(logp, dtype=torch.bool)
    in_head.scatter_(1, top.indices, kept)
    tail_logmass = logp.masked_fill(in_head, -torch.inf).logsumexp(-1)
    draw = ~enough.any(-1) & (tail_logmass > -torch.inf) & bool(s.m_tail)
    tail_ids = torch.zeros((len(logp), s.m_tail), dtype=torch.long, device=logp.device)
    if draw.any():
        mass = logp[draw].double().exp().masked_fill(in_head[draw], 0)
        cdf = mass.cumsum(-1)
        u = torch.from_numpy(uniforms).to(cdf.device)[draw]
        points = (u[:, None] + torch.arange(s.m_tail, device=cdf.device)) / s.m_tail * cdf[:, -1:]
        last = (mass > 0).int().cumsum(-1).argmax(-1, keepdim=True)  # rounding must not pick an impossible id
        tail_ids[draw] = torch.searchsorted(cdf, points, right=True).minimum(last)
    head_first = torch.where(kept, top.indices, logp.shape[1]).sort(-1).values  # sorted by id, padding last
    ids = torch.cat([head_first, tail_ids], 1)
    valid = torch.cat([head_first < logp.shape[1], draw[:, None].expand_as(tail_ids)], 1)
    logprobs = logp.gather(1, ids.clamp(max=logp.shape[1] - 1))
    return (
        token_logps(scaled, token_ids).cpu().numpy(), tail_logmass.cpu().numpy(), kept.sum(-1).cpu().numpy(),
        (draw * s.m_tail).cpu().numpy(), ids[valid].cpu().numpy(), logprobs[valid].cpu().numpy(),
    )  # fmt: skip
