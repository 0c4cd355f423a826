"""Which queries to drop, because another says the same: duplicates, near duplicates, contamination.

*Exact* duplicates have the same text in all messages after NFKC, case folding and collapsing white space. *Near*
duplicates share most word shingles (Jaccard similarity) of their user and assistant messages; system messages, which
whole slices have in common, do not count. Within a split the first in file order is kept. Across splits the held-out
query always wins: a training query that is its duplicate or near duplicate, or shares a run of words with it, is
contaminated. Against the other slices the row that comes later loses, whichever its split, so that no held-out query
was ever trainable; and ingesting a slice again gives what it gave before.

A run that stands in more than COMMON_ROWS held-out queries of a slice, or in more than half of them, is an
instruction they share and no evidence ("put your final answer in a box ..."); GPT-3's decontamination had the same
rule. Near duplicates are found exactly (prefix and position filters of PPJoin: rare shingles first), except that a
row is compared with MAX_CANDIDATES others at most, the earliest in the file.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from nbg_core.config.profile import QuerySettings

COMMON_ROWS = 10
MAX_CANDIDATES = 1000


@dataclass(frozen=True)
class Item:
    """A query to compare. `slice` is its partition, `place` what to call it in a reason."""

    slice_name: str
    split: str
    place: str
    key: str
    body: str


def item(slice_name: str, split: str, place: str, messages: Sequence[dict[str, str]]) -> Item:
    said = [m for m in messages if m["role"] != "system"]
    return Item(slice_name, split, place, text_key(messages), text_key(said))


def text_key(messages: Sequence[dict[str, str]]) -> str:
    """What exact duplicates have in common."""
    return normalised(" ".join(m["content"] for m in messages))


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_drops(own: Sequence[Item], others: Sequence[Item], settings: QuerySettings) -> dict[int, tuple[str, str]]:
    """Index in `own` (in file order) -> (reason, detail) of what to drop; `others` are rows of other slices."""
    drops = _exact(own, others)
    evals = [i for i, x in enumerate(own) if x.split == "eval" and i not in drops]
    trains = [i for i, x in enumerate(own) if x.split == "train" and i not in drops]
    other_evals = [len(own) + i for i, x in enumerate(others) if x.split == "eval"]
    other_trains = [len(own) + i for i, x in enumerate(others) if x.split == "train"]
    texts = _Texts([*own, *others], settings)

    def drop_contaminated(suspects: list[int], against: list[int], runs_of: list[int], what: str) -> None:
        """Drop the `suspects` (own rows) that nearly are, or share a run of `runs_of` (held out) with, `against`."""
        index = texts.index(against)
        shared = texts.shared_runs(suspects, against, runs_of)
        for i in suspects:
            if near := index.find(i):
                drops[i] = ("contaminated", f"{texts.place(near[0])} is {what} and similar ({near[1]:.2f})")
            elif i in shared:
                detail = f"shares {settings.contamination_words} words in a row with {texts.place(shared[i])}, {what}"
                drops[i] = ("contaminated", detail)

    def drop_near(suspects: list[int]) -> None:
        index = texts.index([])
        for i in suspects:
            if i in drops:
                continue
            if near := index.find(i):
                drops[i] = ("near_duplicate", f"similar to {texts.place(near[0])} ({near[1]:.2f})")
            else:
                index.add(i)

    drop_contaminated(evals, other_trains, evals, "a training query")
    drop_near(evals)
    held_out = [i for i in evals if i not in drops] + other_evals
    drop_contaminated(trains, held_out, held_out, "held out")
    drop_near(trains)
    return drops


def _exact(own: Sequence[Item], others: Sequence[Item]) -> dict[int, tuple[str, str]]:
    first = {x.key: x for x in others}
    drops = {}
    for i in sorted(range(len(own)), key=lambda i: (own[i].split != "eval", i)):
        seen = first.setdefault(own[i].key, own[i])
        if seen is own[i]:
            continue
        if seen.split == own[i].split:
            drops[i] = ("duplicate", f"same text as {seen.place}")
        else:
            what = "held out" if seen.split == "eval" else "a training query"
            drops[i] = ("contaminated", f"same text as {seen.place}, {what}")
    return drops


class _Texts:
    """Shingles and runs of all rows. N rows, W words or windows of all rows behind one another."""

    def __init__(self, items: Sequence[Item], settings: QuerySettings):
        self._items, self._settings = items, settings
        words = pl.Series([x.body for x in items], dtype=pl.String).str.split(" ")
        self._lengths = words.list.len().to_numpy().astype(np.int64)  # [N]
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])  # [N + 1]
        self._hashes = words.explode().hash(seed=0).to_numpy()  # [W], one per word
        self._sets, self._set_starts, self._n_unshared = self._shingles(settings.shingle_words)

    def place(self, i: int) -> str:
        return self._items[i].place

    def index(self, rows: Iterable[int]) -> _NearIndex:
        index = _NearIndex(self._sets, self._set_starts, self._n_unshared, self._settings.near_duplicate_jaccard)
        for i in rows:
            index.add(i)
        return index

    def shared_runs(self, suspects: list[int], against: list[int], held_out: list[int]) -> dict[int, int]:
        """Row of `suspects` -> a row of `against` with which it shares a run that is not common in `held_out`."""
        if not suspects or not against:
            return {}
        row, run = self._windows(self._settings.contamination_words)
        common = self._common_runs(row, run, held_out)
        there = np.isin(row, against)
        order = np.argsort(row[there], kind="stable")
        known, first = np.unique(run[there][order], return_index=True)
        owner = row[there][order][first]
        keep = ~np.isin(known, common)
        known, owner = known[keep], owner[keep]
        if not len(known):
            return {}
        here = np.isin(row, suspects)
        at = np.minimum(np.searchsorted(known, run[here]), len(known) - 1)
        hit = known[at] == run[here]
        found: dict[int, int] = {}
        for suspect, other in zip(row[here][hit].tolist(), owner[at[hit]].tolist(), strict=True):
            found.setdefault(suspect, other)
        return found

    def _common_runs(self, row: np.ndarray, run: np.ndarray, held_out: list[int]) -> np.ndarray:
        """Runs that many held-out rows of one slice share."""
        by_slice: dict[str, list[int]] = {}
        for i in held_out:
            by_slice.setdefault(self._items[i].slice_name, []).append(i)
        common = [np.empty(0, dtype=run.dtype)]
        for rows in by_slice.values():
            here = np.isin(row, rows)
            counts = pl.DataFrame({"run": run[here], "row": row[here]}).group_by("run").agg(pl.col("row").n_unique())
            limit = min(COMMON_ROWS, len(rows) / 2) if len(rows) >= 3 else COMMON_ROWS
            common.append(counts.filter(pl.col("row") > limit)["run"].to_numpy())
        return np.concatenate(common)

    def _windows(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Row [W'] and hash [W'] of every run of `n` words, in order of rows."""
        return self._hash_of(np.repeat(np.arange(len(self._lengths)), np.maximum(self._lengths - n + 1, 0)), n)

    def _hash_of(self, row: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        counts = np.bincount(row, minlength=len(self._lengths))
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = self._starts[row] + within
        value = np.zeros(len(row), dtype=np.uint64)
        with np.errstate(over="ignore"):
            for j in range(n):
                value = value * np.uint64(0x9E3779B97F4A7C15) + self._hashes[start + j]
                value ^= value >> np.uint64(29)
        return row, value

    def _shingles(self, n: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The shingle set of every row, behind one another, rarest first within a row; where each set starts; and
        how many shingles only one row has.

        A shingle is named by its rank in the order of frequency, so sets are sorted. A text shorter than `n` words is
        one shingle."""
        parts = [self._windows(n)]
        parts += [self._hash_of(np.flatnonzero(self._lengths == short), short) for short in range(1, n)]
        row = np.concatenate([r for r, _ in parts])
        _, shingle = np.unique(np.concatenate([v for _, v in parts]), return_inverse=True)
        n_shingles = int(shingle.max(initial=-1)) + 1
        pairs = np.sort(row * n_shingles + shingle)
        row, shingle = np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], n_shingles)  # each shingle once a row
        counts = np.bincount(shingle, minlength=n_shingles)
        rank = np.empty(n_shingles, dtype=np.int64)
        rank[np.argsort(counts, kind="stable")] = np.arange(n_shingles)
        order = np.lexsort((rank[shingle], row))
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(self._lengths)))])
        return rank[shingle][order], starts, int((counts == 1).sum())


class _NearIndex:
    """Finds an indexed row whose shingle set overlaps a given one by the Jaccard similarity `threshold` or more.

    Two such sets share one of the first `size - ceil(threshold * size) + 1` elements in any common order, so only these
    are indexed; and what stands behind the first shared element bounds the overlap."""

    def __init__(self, sets: np.ndarray, starts: np.ndarray, n_unshared: int, threshold: float):
        self._sets, self._starts, self._n_unshared, self._threshold = sets, starts, n_unshared, threshold
        self._rows: dict[int, dict[int, dict[int, list[int]]]] = {}  # shingle -> set size -> position -> rows

    def _set(self, i: int) -> np.ndarray:
        return self._sets[self._starts[i] : self._starts[i + 1]]

    def _prefix(self, i: int) -> tuple[int, list[int]]:
        """The elements of the prefix that other rows have too, behind those that none has, and where they start."""
        own = self._set(i)
        end = len(own) - math.ceil(self._threshold * len(own) - 1e-9) + 1
        start = int(np.searchsorted(own[:end], self._n_unshared))
        return start, own[start:end].tolist()

    def add(self, i: int) -> None:
        size = len(self._set(i))
        start, prefix = self._prefix(i)
        for position, shingle in enumerate(prefix, start):
            self._rows.setdefault(shingle, {}).setdefault(size, {}).setdefault(position, []).append(i)

    def find(self, i: int) -> tuple[int, float] | None:
        """The earliest such row and its similarity, or None."""
        t, size = self._threshold, len(self._set(i))
        candidates: set[int] = set()
        start, prefix = self._prefix(i)
        for position, shingle in enumerate(prefix, start):
            for other_size, positions in self._rows.get(shingle, {}).items():
                if other_size < t * size - 1e-9 or size < t * other_size - 1e-9:
                    continue
                needed = math.ceil(t / (1 + t) * (size + other_size) - 1e-9)
                for other_position, rows in positions.items():
                    if min(size - position, other_size - other_position) >= needed:
                        candidates.update(rows)
        return self._verify(i, sorted(candidates)[:MAX_CANDIDATES]) if candidates else None

    def _verify(self, i: int, candidates: list[int]) -> tuple[int, float] | None:
        own = self._set(i)
        sets = [self._set(c) for c in candidates]
        sizes = np.array([len(s) for s in sets])
        joined = np.concatenate(sets)
        shared = own[np.minimum(np.searchsorted(own, joined), len(own) - 1)] == joined
        overlap = np.add.reduceat(shared, np.concatenate([[0], np.cumsum(sizes)[:-1]]), dtype=np.int64)
        similarity = overlap / (sizes + len(own) - overlap)
        hits = np.flatnonzero(similarity >= self._threshold - 1e-9)
        return (candidates[hits[0]], float(similarity[hits[0]])) if len(hits) else None
