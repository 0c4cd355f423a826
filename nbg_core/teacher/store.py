"""The stored teacher distribution: its top entries exactly and systematic samples of the tail, per response position.

The top entries are the smallest set of most probable tokens that leaves at most `epsilon` outside, up to `k_head` of
them. If more than `epsilon` is left, up to `m_tail` ids are drawn from it by systematic sampling (one uniform number
per position, seeded by sample and position). Each stands for an equal share of the tail mass. Apart from rounding, the
cross-entropy against these weights is then an unbiased estimate of that against the whole distribution (random-sampling
distillation, arXiv 2503.16870, stratified here). The mass outside the top entries is exact: a logsumexp over what is
outside, never 1 - sum.

`min_weight` bounds the number of entries. A less probable token is not a top entry, but may be sampled. The tail gets
mass / min_weight samples, rounded up and at most m_tail. A position then has about 1 / min_weight entries at most, and
one at which the teacher is nearly certain has one or two. For a mean over positions this is the best use of a given
number of entries (sampling proportional to size). With 0, every position whose k_head most probable tokens leave more
than epsilon has k_head + m_tail entries.

The stored values are ordinary SQL numbers, prepared for Parquet's BYTE_STREAM_SPLIT encoding with zstd
(`base.files.write_parquet`), which takes almost no space for bytes that are mostly equal:

* Ids are sorted, among the top entries and in the tail, and stored as the difference to the previous one (`entry_gaps`;
  the first is the id itself). DuckDB reads the encoding of floats only, so they are float32 with 2^23 added: the last
  three bytes of such a float are those of a small integer.
* Log-probs are float32 with `logprob_bits` bits of mantissa, those of the tail with 2 fewer. The mass that rounding
  takes from a top entry is added to the next more probable one. The last has more bits, so that the total stays 1.

The columns are declared in `lake.teacher_columns`; there the top entries are called the head.

Shapes: T response positions, V vocabulary, K entries of the widest position, E entries of all positions; in a block, c
rows, the k most probable tokens of each row, and m tail samples of the row with the most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from nbg_core.base.ids import seed_from
from nbg_core.config.profile import TeacherSettings
from nbg_core.lake.teacher_columns import GAP_ZERO, TRAINED_ON
from nbg_core.losses.targets import TeacherTargets

BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
"""Size of the logits handled at once, so that memory does not grow with T x V. A CPU keeps them in its cache."""
MIN_ROWS = 16
"""Minimum number of rows handled at once: torch reduces a few long rows 20 times slower than 8 or more."""
GROUP, UNGROUPED = 128, 2048
"""Of more than UNGROUPED ids, a tail sample is drawn in two steps: GROUP neighbouring ids, then one of these."""
LOG_THIN = math.log(1e-30)
"""A tail whose log mass is this far below the best entry's is computed relative to its own maximum: float32 underflows
at 1e-38."""
LOG_ALONE = -16.0
"""Top entries with a log-prob below this do not pass their rounding error on: they have hardly any mass."""
FINE_BITS = 13
"""Bits of mantissa of the log-probs of which a position has only one (token, tail, most probable entry): rounding
changes them by less than 0.0001 of their value."""


def compress(
    logits: Iterable[Tensor], token_ids: Tensor, lengths: list[int], samples: list[str], s: TeacherSettings
) -> pl.DataFrame:
    """The teacher_logits columns of concatenated responses, a row per sample.

    `logits`: blocks [any, V], float32, whose concatenated rows predict token_ids [T]; `lengths` sum to T, one per
    sample id. Blocks may be overwritten. Raises ValueError when a logit is NaN or +inf, naming the sample."""
    uniforms = np.concatenate([_uniforms(sample, n, s.seed) for sample, n in zip(samples, lengths, strict=True)])
    parts, at, space = [], 0, None
    for tile in logits:
        vocab = tile.shape[1]
        drawing = 8 * (vocab if vocab <= UNGROUPED else GROUP * s.m_tail)  # float64 sums that tails are drawn from
        row_bytes = max(4 * vocab, drawing)
        step = max(MIN_ROWS, BLOCK_BYTES[tile.device.type] // row_bytes)
        if space is None:
            space = tile.new_zeros(step, -(-vocab // GROUP) * GROUP)
        for z in tile.split(step):
            rows = slice(at, at + len(z))
            parts.append(_compress_block(z, token_ids[rows], uniforms[rows], s, space))
            at += len(z)
    token, tail, *entries = (np.concatenate(p) for p in zip(*parts, strict=True))
    bad = np.isnan(token) | np.isnan(tail)
    if bad.any():
        name = samples[int(np.searchsorted(np.cumsum(lengths), np.flatnonzero(bad)[0], side="right"))]
        raise ValueError(
            f"the teacher's logits for sample {name} are not numbers; check the teacher's weights and dtype"
        )
    return frame(samples, lengths, token, tail, *entries, logprob_bits=s.logprob_bits)


def frame(
    samples: list[str],
    lengths: Sequence[int],
    token: np.ndarray,
    tail: np.ndarray,
    n_top: np.ndarray,
    n_tail: np.ndarray,
    ids: np.ndarray,
    logprobs: np.ndarray,
    *,
    logprob_bits: int,
) -> pl.DataFrame:
    """The teacher_logits columns, a row per sample, of concatenated positions.

    `token`: log-probs [T] of the responses' tokens. `tail`: log mass [T] outside the top entries. `n_top`, `n_tail`:
    how many [T] of the `ids` and `logprobs` [E] are a position's top entries and tail, each of them sorted by id. All
    but counts and ids are float32."""
    ends = np.cumsum(lengths)
    entry_ends = np.cumsum(n_top + n_tail)[ends - 1]
    return pl.DataFrame({
        "sample_id": samples,
        "token_logprobs": _lists(round_mantissa(token, FINE_BITS), ends),
        "tail_logmass": _lists(round_mantissa(tail, FINE_BITS), ends),
        "head_counts": _lists(n_top.astype(np.int32), ends),
        "tail_counts": _lists(n_tail.astype(np.int32), ends),
        "entry_gaps": _lists(_gaps(ids.astype(np.int32), n_top, n_tail), entry_ends),
        "entry_logprobs": _lists(_rounded(logprobs, n_top, n_tail, logprob_bits), entry_ends),
    })  # fmt: skip


def targets(rows: pl.DataFrame) -> TeacherTargets:
    """TeacherTargets over the positions of `rows` (teacher_logits columns), concatenated in row order."""
    return decode([{c: row[c][0].to_numpy() for c in TRAINED_ON} for row in rows.iter_slices(1)])


def decode(responses: Sequence[Mapping[str, np.ndarray]]) -> TeacherTargets:
    """TeacherTargets over the positions of `responses` (arrays by name, TRAINED_ON among them), concatenated."""
    column = {
        name: np.concatenate([r[name] for r in responses] or [np.zeros(0, about.dtype)])
        for name, about in TRAINED_ON.items()
    }
    head_counts, tail_counts, tail_logmass = (column[c] for c in ("head_counts", "tail_counts", "tail_logmass"))
    gaps, logp = column["entry_gaps"], column["entry_logprobs"]
    starts, n = _lists_within(head_counts, tail_counts)
    gaps = gaps.astype(np.int64) - GAP_ZERO
    entry_ids = gaps.cumsum()  # over all lists; the sum of the lists before is taken off again
    entry_ids -= np.repeat(entry_ids[starts] - gaps[starts], n)
    count = head_counts + tail_counts
    columns = np.arange(count.max(initial=1), dtype=np.int32)
    is_top, is_entry = columns < head_counts[:, None], columns < count[:, None]  # [T, K]
    ids = np.zeros(is_entry.shape, dtype=np.int64)
    logprobs = np.zeros(is_entry.shape, dtype=np.float32)
    ids[is_entry], logprobs[is_entry] = entry_ids, logp
    arrays = (ids, logprobs, is_top, is_entry & ~is_top, np.array(tail_logmass, dtype=np.float32))
    return TeacherTargets(*map(torch.from_numpy, arrays))


def round_mantissa(x: np.ndarray, bits: int) -> np.ndarray:
    """float32 `x` rounded to `bits` (1 to 23) bits of mantissa, ties away from 0; infinities and NaN stay."""
    drop = 23 - bits
    if not drop:
        return x
    raw = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((raw + np.uint32(1 << (drop - 1))) & ~np.uint32((1 << drop) - 1)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x).astype(np.float32)


def _rounded(logprobs: np.ndarray, n_top: np.ndarray, n_tail: np.ndarray, bits: int) -> np.ndarray:
    """Log-probs [E] of the entries of T positions, rounded so that the top entries of a position keep their total mass.

    Top entries are rounded from the least probable up. The mass that rounding takes from one is added to the next; the
    last one has the bits to keep what is left."""
    result = round_mantissa(logprobs, max(1, bits - 2))
    at, owner = np.flatnonzero(_is_top(n_top, n_tail)), np.repeat(np.arange(len(n_top)), n_top)
    order = at[np.lexsort((logprobs[at], owner))]
    width = n_top.max(initial=0)
    column = np.arange(len(at)) - np.repeat(n_top.cumsum(), n_top) + width  # the most probable one is in the last
    top = np.full((len(n_top), width), -np.inf, dtype=np.float32)
    top[owner, column] = logprobs[order]
    carry = np.zeros(len(top))
    first = int((top >= LOG_ALONE).any(0).argmax()) if top.size else 0
    top[:, :first] = round_mantissa(top[:, :first], bits)
    for j in range(first, width):
        exact, alone = top[:, j], top[:, j] < LOG_ALONE
        own = np.exp(exact, dtype=np.float64)
        mass = own + carry
        with np.errstate(divide="ignore"):
            wanted = np.minimum(np.log(np.maximum(mass, own / 2)), 0.0).astype(np.float32)
        wanted = np.where(alone, exact, wanted)
        top[:, j] = round_mantissa(wanted, bits if j < width - 1 else max(FINE_BITS, bits))
        carry = np.where(alone, 0.0, mass - np.exp(top[:, j], dtype=np.float64))
    result[order] = top[owner, column]
    return result


def _is_top(n_top: np.ndarray, n_tail: np.ndarray) -> np.ndarray:
    """Which entries [E] are top entries."""
    return np.repeat(np.tile([True, False], len(n_top)), np.stack([n_top, n_tail], 1).ravel())


def _gaps(ids: np.ndarray, n_top: np.ndarray, n_tail: np.ndarray) -> np.ndarray:
    """Difference [E] of each id to the one before in its list (see `_lists_within`), or to 0, plus GAP_ZERO."""
    gaps = np.diff(ids, prepend=np.int32(0))
    starts, _ = _lists_within(n_top, n_tail)
    gaps[starts] = ids[starts]
    return (gaps + GAP_ZERO).astype(np.float32)


def _lists_within(n_top: np.ndarray, n_tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start in [E], and length, of the lists: each position's top entries, and its tail, unless they are empty."""
    n = np.stack([n_top, n_tail], 1).ravel()
    starts = np.cumsum(n) - n
    return starts[n > 0], n[n > 0]


def _lists(flat: np.ndarray, ends: np.ndarray) -> pl.Series:
    """Rows flat[ends[i - 1] : ends[i]] as a list column, without a copy per row."""
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(offsets, pa.array(flat))))


def _uniforms(sample: str, n: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed_from("tail", seed, sample))).random(n)


def _compress_block(z: Tensor, token_ids: Tensor, uniforms: np.ndarray, s: TeacherSettings, space: Tensor):
    """The arguments of `frame` from `token` on, for logits z [c, V], which may be overwritten.

    `space` is memory [at least c, V rounded up to whole GROUPs], with zeros from column V on."""
    if s.temperature != 1:
        z.div_(s.temperature)
    vocab = z.shape[1]
    k = min(s.k_head, vocab)
    top_z, top_ids = z.topk(k, dim=-1)  # [c, k]
    best = top_z[:, :1]
    space = space[: len(z)]
    p = torch.sub(z, best, out=space[:, :vocab]).exp_()  # relative to the best
    log_z = p.sum(-1, keepdim=True).log() + best  # [c, 1]
    token = (z.gather(1, token_ids[:, None]) - log_z)[:, 0].where(log_z[:, 0].isfinite(), torch.nan)
    top = top_z - log_z
    p.scatter_(1, top_ids, 0.0)
    beyond = p.sum(-1, keepdim=True).log() + top[:, :1]  # [c, 1]: log mass outside the top k
    thin = (beyond < top[:, :1] + LOG_THIN)[:, 0]
    if thin.any():
        beyond[thin] = z[thin].scatter(1, top_ids[thin], -torch.inf).logsumexp(-1, keepdim=True) - log_z[thin]
    # [c, k]: log mass outside the first j + 1 tokens: a sum over those outside, never 1 - sum over those inside.
    left = torch.cat([top[:, 1:], beyond], 1).double().flip(-1).logcumsumexp(-1).flip(-1)
    enough = left <= (math.log(s.epsilon) if s.epsilon else -torch.inf)
    n_enough = torch.where(enough.any(-1), enough.int().argmax(-1) + 1, vocab)  # [c]
    n_top = n_enough.clamp(max=k).minimum((top.exp() >= s.min_weight).sum(-1).clamp(min=1))  # [c]
    kept = torch.arange(k, device=z.device) < n_top[:, None]
    kept &= top > -torch.inf  # an impossible token is not an entry
    tail_logmass = left.gather(1, n_top[:, None] - 1)[:, 0].float()
    draw = (n_top < n_enough) & (tail_logmass > -torch.inf) & bool(s.m_tail)
    n_tail = draw * _tail_size(tail_logmass.exp(), s)  # [c]
    m = int(n_tail.max())
    drawn = torch.arange(m, device=z.device) < n_tail[:, None]  # [c, m]
    tail_ids = torch.zeros((len(z), m), dtype=torch.long, device=z.device)
    if m:
        p.scatter_(1, top_ids, (top_z - best).exp().masked_fill(kept, 0.0))  # from here on p is only the tail
        thin = draw & (tail_logmass < top[:, 0] + LOG_THIN)
        if thin.any():
            rest = z[thin].scatter(1, top_ids[thin], top_z[thin].masked_fill(kept[thin], -torch.inf))
            p[thin] = (rest - rest.amax(-1, keepdim=True)).exp()
        u = torch.from_numpy(uniforms).to(z.device)
        places = (u[:, None] + torch.arange(m, device=z.device)) / n_tail.clamp(min=1)[:, None]
        tail_ids = _at_places(space, places).where(drawn, 0)
    tail = z.gather(1, tail_ids) - log_z
    order = torch.where(kept, top_ids, vocab).argsort(-1)  # sorted by id, padding last
    ids = torch.cat([top_ids.gather(1, order), tail_ids], 1)
    logprobs = torch.cat([top.gather(1, order), tail], 1)
    valid = torch.cat([kept.gather(1, order), drawn], 1)
    columns = (token, tail_logmass, kept.sum(-1), n_tail, ids[valid], logprobs[valid])
    return tuple(c.cpu().numpy() for c in columns)


def _at_places(p: Tensor, places: Tensor) -> Tensor:
    """Columns [c, m] at which the cumulative sum of p [c, multiple of GROUP] first exceeds `places` [c, m], which are
    fractions of the row's total. A column with p = 0 is never chosen, unless the whole row is 0.

    In two steps, group and column in it: a cumulative sum over all of V is many times slower than sums by groups."""
    if p.shape[1] <= UNGROUPED:
        return _pass(p.double(), places)[0]
    grouped = p.view(len(p), -1, GROUP)
    mass = grouped.sum(-1).double()  # [c, groups]
    group, rest = _pass(mass, places)  # [c, m]
    chosen = grouped.gather(1, group[..., None].expand(-1, -1, GROUP)).double()  # [c, m, GROUP]
    column, _ = _pass(chosen, (rest / mass.gather(1, group)).nan_to_num(0.0)[..., None])  # 0 / 0: a row of zeros
    return group * GROUP + column[..., 0]


def _pass(mass: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Index [..., m] at which the cumulative sum of mass [..., n] first exceeds `places` [..., m] (fractions of the
    total), and how much of the mass at that index lies below the place."""
    total = mass.cumsum(-1)
    whole = total[..., -1:]
    # Below the total, whatever rounding does: then some sum is above, and the first that is belongs to a mass above 0.
    points = (places * whole).minimum(torch.nextafter(whole, torch.zeros_like(whole)))
    index = torch.searchsorted(total, points, right=True).clamp_(max=mass.shape[-1] - 1)
    return index, (points - total.gather(-1, index) + mass.gather(-1, index)).clamp_(min=0)


def _tail_size(mass: Tensor, s: TeacherSettings) -> Tensor:
    """Samples [c] for a tail of `mass` [c]."""
    if not s.min_weight:
        return torch.full_like(mass, s.m_tail, dtype=torch.long)
    return (mass / s.min_weight).ceil().long().clamp(min(1, s.m_tail), s.m_tail)
