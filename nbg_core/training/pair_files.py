"""The training set as files of plain values: written once from the lake, read pair by pair, never whole in memory.

`write_pair_files` streams pairs, token ids, teacher rows and reference log-probs at the request's snapshot into the
training's work folder. There is one file per column, with the responses concatenated in the order in which the lake
gives them, and an index of where each response begins. While it writes, it holds a hash table of the responses in
memory, and everything else in files.

`PairFiles` reads pairs by position, in any order, with a few preads each. What was read before is in the system's page
cache, which shrinks when memory is short.

The files are for this machine: little-endian, without a header. They are whole if and only if `complete.json` exists
and has their sizes.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa

from nbg_core.base.files import write_json
from nbg_core.lake.joins import JOIN_MEMORY, bounded_joins, retry_with_more_memory
from nbg_core.lake.lake import Lake
from nbg_core.lake.teacher_columns import TRAINED_ON
from nbg_core.training.pairs import IN_SLICES, NOTES, PAIRS_AT_ONCE, RECORD, TrainingSetCheck
from nbg_core.training.request import ASSET, TrainingError, TrainingRequest

TABLES: dict[str, dict[str, type[np.generic]]] = {
    "samples": {"prompt_token_ids": np.int32, "token_ids": np.int32},
    "teacher_logits": {column.name: column.dtype for column in TRAINED_ON.values()},
    "reference_logprobs": {"token_logprobs": np.float32},
}
"""Columns that training reads, by table of the lake, with the dtype of their files."""

COLUMNS: dict[str, type[np.generic]] = {name: dtype for columns in TABLES.values() for name, dtype in columns.items()}

# Teacher columns per position have the same offsets, and so have those per entry: the first of each kind is indexed.
_FIRST = {per: next(c.name for c in TRAINED_ON.values() if c.per == per) for per in ("position", "entry")}
_LIKE = {c.name: _FIRST[c.per] for c in TRAINED_ON.values() if c.name != _FIRST[c.per]}
INDEXED = [c for c in COLUMNS if c not in _LIKE]
"""Columns that the index has an entry of."""
INDEX_BYTES = 16 * len(INDEXED)
"""Size of a response in the index: of each indexed column where its values begin and how many they are, as int64."""
FORMAT = 2
"""Version of the files' layout. Files of another version are written again."""
BATCH_ROWS, BATCH_BYTES, TOKEN_BYTES = 256, 32 << 20, 144
"""Maximum number and size of the responses that are read from a join at once. The size is an estimate: TOKEN_BYTES per
position, which is that of a teacher row with 16 entries per position."""
JOINED_BYTES = 64
"""Size of a response in a join's hash table. With a lower memory limit, DuckDB would first spill all rows of the other
table to disk."""
RELEASED = 64
"""Batches between two calls of `_File.release`."""
PAIR_COLUMNS = 6
"""int32 columns of `pairs.bin`: response numbers, prompt tokens and response tokens, of chosen and rejected each."""


def write_pair_files(lake: Lake, request: TrainingRequest, log: Callable[[str], None]) -> None:
    """Write the training set of a request into `request.rows_path`, unless it is there.

    Raises TrainingError when the lake's rows do not fit together (`pairs`)."""
    folder = request.rows_path
    if _complete(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    where = {
        "samples": ("true", []),
        "teacher_logits": ("model_id = ? AND settings_id = ?", [request.teacher_id, request.storage_id]),
        "reference_logprobs": ("model_id = ? AND settings_id = ?", [request.policy_id, request.scoring_id]),
    }
    with bounded_joins(lake, request.snapshot, folder / "spill") as con:
        [(n_pairs,)] = con.execute(f"SELECT count(*) FROM pairs WHERE {IN_SLICES}", [request.slices]).fetchall()
        room = max(JOIN_MEMORY, JOINED_BYTES * 2 * n_pairs)
        pairs = retry_with_more_memory(con, lambda: _write_pairs(con, folder, request.slices), room)
        [(n_responses,)] = con.execute("SELECT count(*) FROM responses").fetchall()
        index = _File(folder / "index.bin", np.int64, (n_responses, len(INDEXED), 2))
        notes = _File(folder / "notes.bin", RECORD, (n_responses, len(NOTES)))
        check = TrainingSetCheck(notes.values)
        longest = 0
        for table, columns in TABLES.items():
            condition, params = where[table]
            query = f"SELECT number, coalesce(({NOTES[table]})::UINTEGER, 0), {', '.join(columns)} FROM {table} "
            query += f"JOIN responses ON response = md5_number(sample_id) WHERE {condition}"
            n_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // (TOKEN_BYTES * max(1, longest))))

            def write(table=table, query=query, params=params, n_rows=n_rows) -> int:
                if (folder / f"{next(iter(TABLES[table]))}.bin").exists():  # an earlier attempt ran out of memory
                    check.forget(table)
                batches = con.execute(query, params).to_arrow_reader(n_rows)
                return _write_columns(batches, folder, table, index, notes, check)

            longest = max(longest, retry_with_more_memory(con, write, room))
            log(f"{ASSET}: training set: {table} of {n_responses} responses written")
        _add_lengths(pairs, folder, index, notes, check)
        try:
            check.end(con, request)
        except TrainingError:
            shutil.rmtree(folder)  # with corrected rows it is another training
            raise
    index.values.flush()
    pairs.values.flush()
    for name in ("notes", "order"):
        (folder / f"{name}.bin").unlink()
    about = {"n_pairs": n_pairs, "n_responses": n_responses, "slices": request.slices, "format": FORMAT}
    write_json(folder / "complete.json", about | {"bytes": _sizes(folder)})


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.bin"))}


def _complete(folder: Path) -> dict | None:
    """The content of `complete.json`; None if it is missing, of another format, or the files have other sizes."""
    file = folder / "complete.json"
    written = json.loads(file.read_text()) if file.exists() else {}
    return written if written.get("format") == FORMAT and written["bytes"] == _sizes(folder) else None


class _File:
    """A memory-mapped array for random access. After `release` its pages do not count as this process's memory."""

    def __init__(self, path: Path, dtype: np.dtype | type, shape: tuple[int, ...]):
        with open(path, "wb") as file:  # a full disk is an error here; later it would be a bus error
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self.values = np.memmap(path, dtype, "r+", shape=shape)
        """Zeros at first."""

    def release(self) -> None:
        """Give the pages back to the system. The mapping is shared: what was written is in the file."""
        self.values._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # numpy has no public way to it


def _write_pairs(con: duckdb.DuckDBPyConnection, folder: Path, slices: list[str]) -> _File:
    """Write `pair_ids.bin`, `slices.bin` and `pairs.bin`, in order of pair_id, and `order.bin`, the pairs' order in the
    lake. Returns `pairs.bin`, whose lengths `_add_lengths` fills in.

    Leaves the temporary table `responses`: a 128-bit hash of the sample id, and a number. Responses are numbered in the
    order in which their pairs lie in the lake. Their other rows lie in about the same order, so that the index is
    written almost from front to back."""
    # Ids are joined as 128-bit hashes: a third of the memory of their text.
    con.execute(
        "CREATE OR REPLACE TEMP TABLE members AS SELECT (row_number() OVER (ORDER BY pair_id) - 1)::INTEGER AS "
        "position, rowid AS place, pair_id, list_position(?::VARCHAR[], slice)::INTEGER - 1 AS slice, "
        f"md5_number(chosen_id) AS chosen, md5_number(rejected_id) AS rejected FROM pairs WHERE {IN_SLICES}",
        [slices, slices],
    )
    con.execute(
        "CREATE OR REPLACE TEMP TABLE responses AS SELECT response, (row_number() OVER (ORDER BY min(place)) - 1)"
        "::INTEGER AS number FROM (SELECT chosen AS response, place FROM members UNION ALL SELECT rejected, place "
        "FROM members) GROUP BY response"
    )
    [(n_pairs, id_bytes)] = con.execute("SELECT count(*), max(strlen(pair_id)) FROM members").fetchall()
    con.execute("SELECT encode(pair_id), slice FROM members ORDER BY position")
    with open(folder / "pair_ids.bin", "wb") as ids, open(folder / "slices.bin", "wb") as indices:
        for batch in con.to_arrow_reader(PAIRS_AT_ONCE):
            ids.write(np.array(batch.column(0).to_pylist(), f"S{id_bytes}").data)
            indices.write(batch.column(1).to_numpy())
    con.execute("SELECT position FROM members ORDER BY place")
    with open(folder / "order.bin", "wb") as order:
        for batch in con.to_arrow_reader(PAIRS_AT_ONCE):
            order.write(batch.column(0).to_numpy())
    pairs = _File(folder / "pairs.bin", np.int32, (n_pairs, PAIR_COLUMNS))
    for side, name in enumerate(("chosen", "rejected")):
        con.execute(f"SELECT position, number FROM responses JOIN members ON response = {name}")
        for batch in con.to_arrow_reader(PAIRS_AT_ONCE):
            pairs.values[batch.column(0).to_numpy(), side] = batch.column(1).to_numpy()
            pairs.release()
    con.execute("DROP TABLE members")
    return pairs


def _write_columns(
    batches: pa.RecordBatchReader, folder: Path, table: str, index: _File, notes: _File, check: TrainingSetCheck
) -> int:
    """Write every batch's values to the columns' files and note where each response begins and how long it is.

    Returns the tokens of the longest response, 0 where there are no token ids."""
    columns = list(TABLES[table])
    files = {c: open(folder / f"{c}.bin", "wb") for c in columns}
    ends, longest = dict.fromkeys(columns, 0), 0
    try:
        for n, batch in enumerate(batches):
            if n % RELEASED == 0:
                index.release()
                notes.release()
            numbers = batch.column(0).to_numpy()
            check.rows(table, numbers, batch.column(1).to_numpy())
            for i, c in enumerate(columns, 2):
                lists = batch.column(i)
                values = lists.flatten().to_numpy(zero_copy_only=False).astype(COLUMNS[c], copy=False)
                lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
                files[c].write(np.ascontiguousarray(values).data)
                if c in INDEXED:
                    at = INDEXED.index(c)
                    index.values[numbers, at, 0] = ends[c] + np.cumsum(lengths) - lengths
                    index.values[numbers, at, 1] = lengths
                ends[c] += int(lengths.sum())
                if c == "token_ids":
                    longest = max(longest, int(lengths.max(initial=0)))
    finally:
        for file in files.values():
            file.close()
    return longest


def _add_lengths(pairs: _File, folder: Path, index: _File, notes: _File, check: TrainingSetCheck) -> None:
    """Check every pair, and write the lengths of its prompts and responses into `pairs`."""
    columns = {"prompt": "prompt_token_ids", "response": "token_ids", "teacher": _FIRST["position"],
               "reference": "token_logprobs"}  # fmt: skip
    order = np.memmap(folder / "order.bin", np.int32, "r")  # in this order, neighbours are neighbours in the index, too
    pair_ids = _pair_ids(folder, len(order))
    for start in range(0, len(order), PAIRS_AT_ONCE):
        for file in (pairs, index, notes):
            file.release()
        at = order[start : start + PAIRS_AT_ONCE]
        both = pairs.values[at, :2]
        lengths = {name: index.values[both, INDEXED.index(c), 1] for name, c in columns.items()}

        def id_of(i: int, at: np.ndarray = at) -> str:
            return pair_ids[at[i]].decode()

        check.pairs(id_of, both, lengths)
        pairs.values[at, 2:] = np.concatenate([lengths["prompt"], lengths["response"]], 1)


def _pair_ids(folder: Path, n_pairs: int) -> np.ndarray:
    """The pair ids [n_pairs] in UTF-8, each as wide as the longest."""
    file = folder / "pair_ids.bin"
    return np.memmap(file, f"S{file.stat().st_size // n_pairs}", "r")


class PairFiles:
    """A written training set. Safe to read from several threads."""

    def __init__(self, folder: Path):
        """Raises FileNotFoundError if `folder` holds no whole training set."""
        written = _complete(folder)
        if written is None:
            raise FileNotFoundError(f"no training set at {folder}; materialise student_checkpoint again to write it")
        self.n_pairs, self.slices = written["n_pairs"], written["slices"]
        self._ids = _pair_ids(folder, self.n_pairs)
        self._slices = np.memmap(folder / "slices.bin", np.int32, "r")
        pairs = np.memmap(folder / "pairs.bin", np.int32, "r", shape=(self.n_pairs, PAIR_COLUMNS))
        self.numbers = pairs[:, :2]
        """[pairs, 2] int32: response numbers of chosen and rejected."""
        self.n_prompt = pairs[:, 2:4]
        """[pairs, 2] int32: prompt tokens."""
        self.n_tokens = pairs[:, 4:]
        """[pairs, 2] int32: response tokens."""
        self._files = {c: os.open(folder / f"{c}.bin", os.O_RDONLY) for c in (*COLUMNS, "index")}

    def pair_id(self, pair: int) -> str:
        return self._ids[pair].decode()

    def names(self, pairs: np.ndarray) -> pl.DataFrame:
        """pair_id and slice of `pairs`."""
        slices = np.array(self.slices)[self._slices[pairs]]
        return pl.DataFrame({"pair_id": [pair_id.decode() for pair_id in self._ids[pairs]], "slice": slices.tolist()})

    def read(self, number: int) -> dict[str, np.ndarray]:
        """The values of a response, by column."""
        record = os.pread(self._files["index"], INDEX_BYTES, INDEX_BYTES * int(number))
        places = dict(zip(INDEXED, np.frombuffer(record, np.int64).reshape(-1, 2).tolist(), strict=True))
        found = {}
        for column, dtype in COLUMNS.items():
            start, length = places[_LIKE.get(column, column)]
            size = np.dtype(dtype).itemsize
            found[column] = np.frombuffer(os.pread(self._files[column], size * length, size * start), dtype)
        return found
