"""The training set as files of plain values: written once from the lake, read pair by pair, never whole in memory.

`write_rows` streams pairs, token ids, teacher rows and reference log-probs at the request's snapshot into the
training's work folder: one file per column, responses behind one another in the order in which the lake gives them,
and an index of where each response begins. `Rows` reads a pair by position with a few preads, in any order; what was
read before is in the system's page cache, which is given back when memory is short. Work files of one machine:
little-endian, no header, whole if and only if `complete.json` is there.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from nbg_core.files import write_json
from nbg_core.lake import Lake
from nbg_core.training.pairs import NOTES, Check
from nbg_core.training.request import ASSET, Request, TrainingError

TABLES = {
    "samples": ("prompt_token_ids", "token_ids"),
    "teacher_logits": ("head_counts", "tail_counts", "tail_logmass", "entry_gaps", "entry_logprobs"),
    "reference_logprobs": ("token_logprobs",),
}
"""Columns that training reads."""

COLUMNS = {
    "prompt_token_ids": np.int32, "token_ids": np.int32, "head_counts": np.int32, "tail_counts": np.int32,
    "tail_logmass": np.float32, "entry_gaps": np.float32, "entry_logprobs": np.float32, "token_logprobs": np.float32,
}  # fmt: skip

# Columns whose values lie at the same places as another's of their table.
_LIKE = {"tail_counts": "head_counts", "tail_logmass": "head_counts", "entry_logprobs": "entry_gaps"}
INDEXED = [c for c in COLUMNS if c not in _LIKE]
INDEX_BYTES = 16 * len(INDEXED)
"""An index entry is where each indexed column's values begin and how many there are, as int64."""
ID_BYTES = 32
BATCH_ROWS = 256
"""Responses that come out of the join at once; long ones are 0.3 MB each."""
RELEASED = 64
"""Batches after which the index's pages are given back to the system."""


def write_rows(lake: Lake, request: Request, log: Callable[[str], None]) -> None:
    """Write the training set of a request into `request.rows`, unless it is there.

    Raises TrainingError when the lake's rows do not fit together (`pairs`)."""
    folder = request.rows
    if (folder / "complete.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    where = {
        "samples": ("true", []),
        "teacher_logits": ("model_id = ? AND settings_id = ?", [request.teacher_id, request.storage_id]),
        "reference_logprobs": ("model_id = ? AND settings_id = ?", [request.policy_id, request.scoring_id]),
    }
    with lake.joins(request.snapshot, folder / "spill") as con:
        con.execute(
            "CREATE TEMP TABLE members AS SELECT pair_id, chosen_id, rejected_id FROM pairs "
            "WHERE slice IN (SELECT unnest(?::VARCHAR[]))",
            [request.slices],
        )
        con.execute(
            "CREATE TEMP TABLE responses AS SELECT sample_id, row_number() OVER (ORDER BY sample_id) - 1 AS "
            "number FROM (SELECT chosen_id AS sample_id FROM members UNION SELECT rejected_id FROM members)"
        )
        n_responses = con.execute("SELECT count(*) FROM responses").fetchone()[0]
        index = np.memmap(folder / "index.bin", np.int64, "w+", shape=(n_responses, len(INDEXED), 2))
        check = Check(n_responses)
        for table, columns in TABLES.items():
            condition, params = where[table]
            con.execute(
                f"SELECT number, coalesce(({NOTES[table]})::UINTEGER, 0), {', '.join(columns)} FROM {table} "
                f"JOIN responses USING (sample_id) WHERE {condition}",
                params,
            )
            _write_columns(con.to_arrow_reader(BATCH_ROWS), folder, table, index, check)
            log(f"{ASSET}: {table} of {n_responses} responses ready")
        con.execute(
            "SELECT pair_id, c.number, r.number FROM members JOIN responses c ON c.sample_id = chosen_id "
            "JOIN responses r ON r.sample_id = rejected_id ORDER BY pair_id"
        )
        n_pairs = _write_pairs(con.to_arrow_reader(BATCH_ROWS), folder, index, check)
        try:
            check.end(con, request)
        except TrainingError:
            shutil.rmtree(folder)  # what mends it makes another training
            raise
    index.flush()
    write_json(folder / "complete.json", {"n_pairs": n_pairs, "n_responses": n_responses})


def _write_columns(batches: pa.RecordBatchReader, folder: Path, table: str, index: np.memmap, check: Check) -> None:
    """Append every batch's values to the columns' files and note where each response begins and how long it is."""
    columns = TABLES[table]
    files = {c: open(folder / f"{c}.bin", "wb") for c in columns}
    ends = dict.fromkeys(columns, 0)
    try:
        for n, batch in enumerate(batches):
            _release(index, n)
            numbers = batch.column(0).to_numpy()
            check.rows(table, numbers, batch.column(1).to_numpy())
            for i, c in enumerate(columns, 2):
                lists = batch.column(i)
                values = lists.flatten().to_numpy(zero_copy_only=False).astype(COLUMNS[c], copy=False)
                lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
                files[c].write(np.ascontiguousarray(values))
                if c in INDEXED:
                    at = INDEXED.index(c)
                    index[numbers, at, 0] = ends[c] + np.cumsum(lengths) - lengths
                    index[numbers, at, 1] = lengths
                ends[c] += int(lengths.sum())
    finally:
        for file in files.values():
            file.close()


def _release(index: np.memmap, n: int) -> None:
    """Every RELEASED batches, give the index's pages back. Its mapping is shared: what was written is in the file."""
    if n % RELEASED == 0:
        index._mmap.madvise(mmap.MADV_DONTNEED)


def _write_pairs(batches: pa.RecordBatchReader, folder: Path, index: np.memmap, check: Check) -> int:
    """Ids, response numbers and lengths of the pairs, in order of pair_id."""
    columns = {"prompt": "prompt_token_ids", "response": "token_ids", "teacher": "head_counts",
               "reference": "token_logprobs"}  # fmt: skip
    n = 0
    with open(folder / "pair_ids.bin", "wb") as ids, open(folder / "pairs.bin", "wb") as pairs:
        for i, batch in enumerate(batches):
            _release(index, i)
            pair_ids = batch.column(0).to_pylist()
            ids.write("".join(pair_ids).encode())
            both = np.stack([batch.column(1).to_numpy(), batch.column(2).to_numpy()], 1)  # [n, 2]
            lengths = {name: index[both, INDEXED.index(c), 1] for name, c in columns.items()}
            check.pairs(pair_ids, both, lengths)
            pairs.write(np.concatenate([both, lengths["prompt"], lengths["response"]], 1).astype(np.int32).tobytes())
            n += batch.num_rows
    return n


class Rows:
    """A written training set. Safe to read from several threads."""

    def __init__(self, folder: Path):
        """Raises FileNotFoundError if `folder` holds no whole training set."""
        if not (folder / "complete.json").exists():
            raise FileNotFoundError(f"no training set at {folder}; materialise student_checkpoint again to write it")
        self.n_pairs = json.loads((folder / "complete.json").read_text())["n_pairs"]
        pairs = np.memmap(folder / "pairs.bin", np.int32, "r", shape=(self.n_pairs, 6))
        self.numbers = pairs[:, :2]
        """[pairs, 2] int32: response numbers of chosen and rejected."""
        self.n_prompt = pairs[:, 2:4]
        """[pairs, 2] int32: prompt tokens."""
        self.n_tokens = pairs[:, 4:]
        """[pairs, 2] int32: response tokens."""
        self._files = {c: os.open(folder / f"{c}.bin", os.O_RDONLY) for c in (*COLUMNS, "pair_ids", "index")}

    def pair_id(self, pair: int) -> str:
        return os.pread(self._files["pair_ids"], ID_BYTES, ID_BYTES * int(pair)).decode()

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
