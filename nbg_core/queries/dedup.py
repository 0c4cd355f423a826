"""Finds the queries to drop because of another query's text: duplicates, near duplicates and contamination.

*Exact duplicates* have the same text in all messages after NFKC normalisation, case folding and collapsing white space.
*Near duplicates* share most word shingles (Jaccard similarity) of their user and assistant messages. System messages do
not count, because whole slices share them. A training query is *contaminated* when it is a duplicate or near duplicate
of a held-out query, or shares a run of words with one.

Within a split of a file, the first query in file order is kept. Between the splits of a file, the held-out query is
kept. Between slices, the query that was ingested first is kept, whatever its split. So no held-out query was ever
trained on, and ingesting a slice again gives the same rows. Near duplicates of the same split in two slices are both
kept.

A run of words that occurs in more than COMMON_ROWS held-out queries of a slice, or in more than half of them if there
are at least three, is a shared instruction ("put your final answer in a box ...") and does not count; GPT-3's
decontamination had the same rule. Near duplicates are found exactly (with the prefix and position filters of PPJoin,
rare shingles first), except that a row is compared with at most MAX_CANDIDATES others, the earliest in the file.
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
"""A run of words that occurs in more held-out queries of a slice than this does not count as contamination."""
MAX_CANDIDATES = 1000
"""Maximum number of rows that a row is compared with in the search for a near duplicate."""


@dataclass(frozen=True)
class Item:
    """A query to compare."""

    slice_name: str
    split: str
    """'train' or 'eval'."""
    place: str
    """What the query is called in the reason for a drop: its line, or its id and slice."""
    key: str
    """Normalised text of all messages; exact duplicates have the same."""
    body: str
    """Normalised text of all messages except system messages; near duplicates have similar ones."""


def item(slice_name: str, split: str, place: str, messages: Sequence[dict[str, str]]) -> Item:
    """The Item of a query with these messages."""
    without_system = [m for m in messages if m["role"] != "system"]
    return Item(slice_name, split, place, text_key(messages), text_key(without_system))


def text_key(messages: Sequence[dict[str, str]]) -> str:
    """The normalised text of messages; those of exact duplicates are equal."""
    return normalised(" ".join(m["content"] for m in messages))


def normalised(text: str) -> str:
    """`text` in NFKC, case folded, with one space for each run of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_drops(own: Sequence[Item], others: Sequence[Item], settings: QuerySettings) -> dict[int, tuple[str, str]]:
    """Index in `own` -> (reason, detail) of each query to drop.

    `own` are the queries of the slice, in file order; `others` are those of slices that were ingested before."""
    drops = _exact(own, others)
    evals = [i for i, x in enumerate(own) if x.split == "eval" and i not in drops]
    trains = [i for i, x in enumerate(own) if x.split == "train" and i not in drops]
    other_evals = [len(own) + i for i, x in enumerate(others) if x.split == "eval"]
    other_trains = [len(own) + i for i, x in enumerate(others) if x.split == "train"]
    texts = _Texts([*own, *others], settings)

    def drop_contaminated(suspects: list[int], against: list[int], runs_of: list[int], what: str) -> None:
        """Drop the `suspects` that are near duplicates of a row of `against`, or share a run of words with one.

        Runs that are common in the held-out rows `runs_of` do not count. `what` describes the rows of `against`."""
        index = texts.index(against)
        shared = texts.shared_runs(suspects, against, runs_of)
        for i in suspects:
            if near := index.find(i):
                drops[i] = ("contaminated", f"{texts.place(near[0])} is {what} and similar ({near[1]:.2f})")
            elif i in shared:
                detail = f"shares {settings.contamination_words} words in a row with {texts.place(shared[i])}, {what}"
                drops[i] = ("contaminated", detail)

    def drop_near(suspects: list[int]) -> None:
        """Drop the `suspects` that are near duplicates of an earlier one."""
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
    """The drops of `find_drops` that are exact duplicates. Held-out queries come first, so that they are kept."""
    first = {x.key: x for x in others}
    drops = {}
    for i in sorted(range(len(own)), key=lambda i: (own[i].split != "eval", i)):
        kept = first.setdefault(own[i].key, own[i])
        if kept is own[i]:
            continue
        if kept.split == own[i].split:
            drops[i] = ("duplicate", f"same text as {kept.place}")
        else:
            what = "held out" if kept.split == "eval" else "a training query"
            drops[i] = ("contaminated", f"same text as {kept.place}, {what}")
    return drops


class _Texts:
    """Shingles and runs of words of all rows.

    Shapes: R rows (queries), W words of all rows concatenated, G windows (runs of n words within a row) of all rows."""

    def __init__(self, items: Sequence[Item], settings: QuerySettings):
        self._items, self._settings = items, settings
        words = pl.Series([x.body for x in items], dtype=pl.String).str.split(" ")
        self._lengths = words.list.len().to_numpy().astype(np.int64)  # [R]
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])  # [R + 1]
        self._word_hashes = words.explode().hash(seed=0).to_numpy()  # [W]
        self._sets, self._set_starts, self._n_unshared = self._shingles(settings.shingle_words)

    def place(self, i: int) -> str:
        """What row `i` is called in a reason."""
        return self._items[i].place

    def index(self, rows: Iterable[int]) -> _NearIndex:
        """An index of the shingle sets of `rows`."""
        index = _NearIndex(self._sets, self._set_starts, self._n_unshared, self._settings.near_duplicate_jaccard)
        for i in rows:
            index.add(i)
        return index

    def shared_runs(self, suspects: list[int], against: list[int], held_out: list[int]) -> dict[int, int]:
        """Row of `suspects` -> a row of `against` with which it shares a run that is not common in `held_out`."""
        if not suspects or not against:
            return {}
        row, run = self._windows(self._settings.contamination_words)  # [G] each
        common = self._common_runs(row, run, held_out)
        in_against = np.isin(row, against)  # [G]
        order = np.argsort(row[in_against], kind="stable")
        known, first = np.unique(run[in_against][order], return_index=True)  # sorted runs of `against`
        owner = row[in_against][order][first]  # the earliest row that has each
        keep = ~np.isin(known, common)
        known, owner = known[keep], owner[keep]
        if not len(known):
            return {}
        in_suspects = np.isin(row, suspects)  # [G]
        at = np.minimum(np.searchsorted(known, run[in_suspects]), len(known) - 1)
        hit = known[at] == run[in_suspects]
        found: dict[int, int] = {}
        for suspect, other in zip(row[in_suspects][hit].tolist(), owner[at[hit]].tolist(), strict=True):
            found.setdefault(suspect, other)
        return found

    def _common_runs(self, row: np.ndarray, run: np.ndarray, held_out: list[int]) -> np.ndarray:
        """Runs that are common in the `held_out` rows of a slice. row [G] and run [G] are of all windows."""
        by_slice: dict[str, list[int]] = {}
        for i in held_out:
            by_slice.setdefault(self._items[i].slice_name, []).append(i)
        common = [np.empty(0, dtype=run.dtype)]
        for rows in by_slice.values():
            in_slice = np.isin(row, rows)  # [G]
            windows = pl.DataFrame({"run": run[in_slice], "row": row[in_slice]})
            counts = windows.group_by("run").agg(pl.col("row").n_unique())
            limit = min(COMMON_ROWS, len(rows) / 2) if len(rows) >= 3 else COMMON_ROWS
            common.append(counts.filter(pl.col("row") > limit)["run"].to_numpy())
        return np.concatenate(common)

    def _windows(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Row [G] and hash [G] of every run of `n` words, in order of rows."""
        return self._hash_of(np.repeat(np.arange(len(self._lengths)), np.maximum(self._lengths - n + 1, 0)), n)

    def _hash_of(self, row: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes [G] of windows of `n` words, given the sorted row [G] of each: a row's windows start at its first
        word, its second word, and so on. Returns (row, hashes)."""
        counts = np.bincount(row, minlength=len(self._lengths))  # [R]
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # [G], 0, 1, ... in each row
        start = self._starts[row] + within  # [G]
        value = np.zeros(len(row), dtype=np.uint64)  # [G]
        with np.errstate(over="ignore"):
            for j in range(n):
                value = value * np.uint64(0x9E3779B97F4A7C15) + self._word_hashes[start + j]
                value ^= value >> np.uint64(29)
        return row, value

    def _shingles(self, n: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(shingle sets of all rows, each sorted, concatenated; where each set starts [R + 1]; number of shingles that
        only one row has).

        A shingle is represented by its frequency rank, rarest first, so those of a single row have the lowest ranks. A
        text shorter than `n` words is one shingle."""
        windows = [self._windows(n)]
        windows += [self._hash_of(np.flatnonzero(self._lengths == short), short) for short in range(1, n)]
        row = np.concatenate([rows for rows, _ in windows])
        _, shingle = np.unique(np.concatenate([hashes for _, hashes in windows]), return_inverse=True)
        n_shingles = int(shingle.max(initial=-1)) + 1
        keys = np.sort(row * n_shingles + shingle)
        row, shingle = np.divmod(keys[np.diff(keys, prepend=-1) > 0], n_shingles)  # each shingle once per row
        counts = np.bincount(shingle, minlength=n_shingles)
        rank = np.empty(n_shingles, dtype=np.int64)
        rank[np.argsort(counts, kind="stable")] = np.arange(n_shingles)
        order = np.lexsort((rank[shingle], row))
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(self._lengths)))])
        return rank[shingle][order], starts, int((counts == 1).sum())


class _NearIndex:
    """Finds an indexed row whose shingle set has at least the Jaccard similarity `threshold` with a given row's.

    When all sets are sorted by one order, two such sets share one of their first `size - ceil(threshold * size) + 1`
    elements, so only these (the prefix) are indexed. The number of elements after the first shared one bounds the
    overlap."""

    def __init__(self, sets: np.ndarray, starts: np.ndarray, n_unshared: int, threshold: float):
        self._sets, self._starts, self._n_unshared, self._threshold = sets, starts, n_unshared, threshold
        self._rows: dict[int, dict[int, dict[int, list[int]]]] = {}  # shingle -> set size -> position -> rows

    def _set(self, i: int) -> np.ndarray:
        return self._sets[self._starts[i] : self._starts[i + 1]]

    def _prefix(self, i: int) -> tuple[int, list[int]]:
        """Position of the first element of row `i`'s prefix that another row has too, and the prefix from there on.

        Elements that only this row has can match nothing. They are the rarest, so they come first."""
        own = self._set(i)
        end = len(own) - math.ceil(self._threshold * len(own) - 1e-9) + 1
        start = int(np.searchsorted(own[:end], self._n_unshared))
        return start, own[start:end].tolist()

    def add(self, i: int) -> None:
        """Index row `i`."""
        size = len(self._set(i))
        start, prefix = self._prefix(i)
        for position, shingle in enumerate(prefix, start):
            self._rows.setdefault(shingle, {}).setdefault(size, {}).setdefault(position, []).append(i)

    def find(self, i: int) -> tuple[int, float] | None:
        """The earliest indexed row that is similar enough to row `i`, and its similarity; None if there is none."""
        threshold, size = self._threshold, len(self._set(i))
        candidates: set[int] = set()
        start, prefix = self._prefix(i)
        for position, shingle in enumerate(prefix, start):
            for other_size, positions in self._rows.get(shingle, {}).items():
                if other_size < threshold * size - 1e-9 or size < threshold * other_size - 1e-9:
                    continue
                needed = math.ceil(threshold / (1 + threshold) * (size + other_size) - 1e-9)  # shared elements
                for other_position, rows in positions.items():
                    if min(size - position, other_size - other_position) >= needed:
                        candidates.update(rows)
        return self._verify(i, sorted(candidates)[:MAX_CANDIDATES]) if candidates else None

    def _verify(self, i: int, candidates: list[int]) -> tuple[int, float] | None:
        """The first of `candidates` that is similar enough to row `i`, by whole sets, and its similarity."""
        own = self._set(i)
        sets = [self._set(c) for c in candidates]
        sizes = np.array([len(s) for s in sets])
        joined = np.concatenate(sets)
        shared = own[np.minimum(np.searchsorted(own, joined), len(own) - 1)] == joined
        overlap = np.add.reduceat(shared, np.concatenate([[0], np.cumsum(sizes)[:-1]]), dtype=np.int64)
        similarity = overlap / (sizes + len(own) - overlap)
        hits = np.flatnonzero(similarity >= self._threshold - 1e-9)
        return (candidates[hits[0]], float(similarity[hits[0]])) if len(hits) else None
