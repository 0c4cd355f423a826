"""The pairs to train on, and the checks that their rows must pass before training starts.

Every response has its samples row, its teacher row (this teacher, these storage settings) and its reference row (this
policy and dtype), once each, and all of them have one entry per response token. Both responses of a pair answer one
prompt, token by token. `pair_files.write_pair_files` checks the rows as it writes them, so the lake is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np

from nbg_core.base.ids import content_version
from nbg_core.lake.joins import bounded_joins, retry_with_more_memory
from nbg_core.lake.lake import Lake
from nbg_core.lake.teacher_columns import ROW_IS_WHOLE
from nbg_core.training.request import TrainingError, TrainingRequest

NOTES = {
    "samples": "hash(prompt_token_ids) % 4294967296",
    "teacher_logits": ROW_IS_WHOLE,
    "reference_logprobs": "token_logprobs IS NOT NULL",
}
"""SQL, by table, of a number that is kept of each row: a 32-bit hash of its prompt, or whether the row is whole. If two
prompts share a hash, the check misses that they differ; nothing else depends on it."""
IN_SLICES = "slice IN (SELECT unnest(?::VARCHAR[]))"
PAIRS_AT_ONCE = 16_384
"""Pairs that are read at once."""
DELETING = "docs/operations.md, Making one partition again"
"""Where a user finds how to delete rows."""


def count_and_hash_pairs(lake: Lake, snapshot: int, slices: Sequence[str], spill: Path) -> tuple[int, str]:
    """The number of pairs in the slices, and the content version of their ids. What does not fit into memory goes to
    the folder `spill`, which is removed at the end. Raises TrainingError for a pair that appears twice."""
    with bounded_joins(lake, snapshot, spill) as con:
        n, version, n_twice, twice = retry_with_more_memory(con, lambda: _count_and_hash(con, slices))
    if twice:
        pair, one, other = twice
        raise TrainingError(
            f"pair {pair} appears twice at snapshot {snapshot}, in slices {one!r} and {other!r} ({n_twice} such "
            "pairs); a query that has moved from one slice to another is still in both: materialise filtered_pairs of "
            "both again"
        )
    return n, version


RECORD = np.dtype([("n_rows", np.uint16), ("note", np.uint32)])
"""What is kept of a response for each table: the number of its rows, and the note of the one that was read last."""


def _count_and_hash(con: duckdb.DuckDBPyConnection, slices: Sequence[str]) -> tuple[int, str, int, tuple]:
    """Number of pairs, content version, number of pairs that appear twice, and the first of these with its slices."""
    n, n_twice = 0, 0
    twice: tuple = ()
    last: tuple = (None, None)
    con.execute(f"SELECT pair_id, slice FROM pairs WHERE {IN_SLICES} ORDER BY pair_id, slice", [list(slices)])

    def pair_ids() -> Iterator[str]:
        nonlocal n, n_twice, twice, last
        for batch in con.to_arrow_reader(PAIRS_AT_ONCE):
            for here in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if here[0] == last[0]:
                    n_twice, twice = n_twice + 1, twice or (*last, here[1])
                last = here
                n += 1
                yield here[0]

    version = content_version(pair_ids(), in_order=True)
    return n, version, n_twice, twice


class TrainingSetCheck:
    """Checks a training set while it is written: first the rows of all responses (`rows`), then the pairs (`pairs`).
    `end` raises the error of the first response that does not fit. Responses are numbered from 0."""

    def __init__(self, records: np.ndarray):
        """`records`: [responses, tables of NOTES] of dtype RECORD, zeros at first; it is filled by `rows`."""
        self.n_rows, self.notes = (
            {table: records[:, i][name] for i, table in enumerate(NOTES)} for name in ("n_rows", "note")
        )
        self.n_unfit = 0
        self.first: dict[str, dict] = {}  # what is known of the first repeated response, and of the first unfit one

    def forget(self, table: str) -> None:
        """Reset the counts of a table whose rows are about to be read again."""
        self.n_rows[table][:] = 0

    def rows(self, table: str, numbers: np.ndarray, notes: np.ndarray) -> None:
        """Count rows of a table: `numbers` [n] of their responses, in any order, and their `notes` [n] (NOTES)."""
        np.add.at(self.n_rows[table], numbers, 1)
        self.notes[table][numbers] = notes

    def pairs(self, id_of: Callable[[int], str], both: np.ndarray, lengths: dict[str, np.ndarray]) -> None:
        """Check the next n pairs. `id_of(i)` is the id of the i-th, `both` [n, 2] the response numbers of chosen and
        rejected, and `lengths` has, as [n, 2] each, their prompt tokens, response tokens, teacher positions and
        reference log-probs."""
        n_rows = {table: s[both] for table, s in self.n_rows.items()}
        missing = {table: s == 0 for table, s in n_rows.items()}
        prompts, n = self.notes["samples"][both], lengths
        differ = (prompts[:, :1] != prompts[:, 1:]) & ~missing["samples"].any(1, keepdims=True)
        facts = {
            "repeated": np.any([s > 1 for s in n_rows.values()], axis=0),
            "prompts_differ": np.repeat(differ, 2, axis=1),
            "is_whole": self.notes["teacher_logits"][both] > 0,
        }
        unfit = facts["repeated"] | facts["prompts_differ"] | ~facts["is_whole"] | np.any([*missing.values()], axis=0)
        unfit |= (n["prompt"] <= 0) | (n["response"] <= 0)
        unfit |= (n["teacher"] != n["response"]) | (n["reference"] != n["response"])
        self.n_unfit += int(unfit.sum())
        for kind, which in {"repeated": facts["repeated"], "unfit": unfit}.items():
            if which.any() and kind not in self.first:
                at = tuple(np.argwhere(which)[0])
                self.first[kind] = {
                    "pair_id": id_of(at[0]), "side": ("chosen", "rejected")[at[1]],
                    "missing": [table for table, m in missing.items() if m[at]],
                    "surplus": [table for table, s in n_rows.items() if s[at] > 1],
                    **{name: values[at].item() for name, values in (facts | lengths).items()},
                }  # fmt: skip

    def worst(self) -> dict | None:
        """The first repeated response, else the first that does not fit."""
        return self.first.get("repeated") or self.first.get("unfit")

    def end(self, con: duckdb.DuckDBPyConnection, request: TrainingRequest) -> None:
        """Raise TrainingError for the first response with a repeated row, else the first with a row that is missing,
        damaged or of another length, or with another prompt than the other response of its pair."""
        r = self.worst()
        if r is None:
            return
        [(slice_name, sample)] = con.execute(
            f"SELECT slice, {r['side']}_id FROM pairs WHERE {IN_SLICES} AND pair_id = ?",
            [request.slices, r["pair_id"]],
        ).fetchall()
        what, remedy = _problem(r, request.teacher_id, request.policy_id)
        raise TrainingError(
            f"pair {r['pair_id']} of slice {slice_name!r}: its {r['side']} response, sample {sample}, has {what} at "
            f"snapshot {request.snapshot} ({self.n_unfit} responses that do not fit); {remedy}"
        )


def _problem(r: dict, teacher: str, reference: str) -> tuple[str, str]:
    """What is wrong with a response, and what to do about it."""
    if r["repeated"]:
        return f"more than one {' and '.join(r['surplus'])} row", f"delete the surplus rows ({DELETING})"
    missing = {
        "samples": ("no samples row", "student_samples and filtered_pairs"),
        "teacher_logits": (f"no teacher_logits row of teacher {teacher} with these storage settings", "teacher_logits"),
        "reference_logprobs": (f"no reference_logprobs row of policy {reference} in this dtype", "reference_logprobs"),
    }
    for table in r["missing"]:
        what, asset = missing[table]
        return what, f"materialise {asset} of this slice again"
    if r["prompts_differ"]:
        what = "other prompt_token_ids than the pair's other response"
        return what, "set another sampling.seed, so that all responses are drawn anew, and materialise this slice again"
    what = (
        f"{r['prompt']} prompt tokens, {r['response']} response tokens, {r['teacher']} teacher positions"
        f"{'' if r['is_whole'] else ' (damaged)'} and {r['reference']} reference log-probs"
    )
    return what, (
        f"delete this sample's teacher_logits and reference_logprobs rows ({DELETING}) and materialise both again"
    )
