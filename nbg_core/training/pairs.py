"""The pairs to train on, and what their rows must be, or nothing is trained on them.

Every response has its samples row, its teacher row (this teacher, these storage settings) and its reference row (this
policy and dtype), once each, and all of them have one entry per response token. Both responses of a pair answer one
prompt, token by token. `rows.write_rows` looks at the rows as it writes them: the lake is read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import duckdb
import numpy as np
import polars as pl

from nbg_core.lake import Lake
from nbg_core.training.request import Request, TrainingError

NOTES = {
    "samples": "hash(prompt_token_ids) % 4294967296",
    "teacher_logits": "len(token_logprobs) = len(head_counts) AND len(tail_counts) = len(head_counts) "
    "AND len(tail_logmass) = len(head_counts) AND len(entry_gaps) = len(entry_logprobs) "
    "AND len(entry_gaps) = list_sum(head_counts) + list_sum(tail_counts)",
    "reference_logprobs": "0",
}
"""SQL of the number that is noted of a row besides the lengths of its lists: its prompt; whether it is whole; 0."""


def read_pairs(lake: Lake, snapshot: int, slices: Sequence[str]) -> pl.DataFrame:
    """The pairs in order of pair_id: pair_id, slice."""
    return lake.sql(
        "SELECT pair_id, slice FROM pairs WHERE slice IN (SELECT unnest(?::VARCHAR[])) ORDER BY pair_id",
        [list(slices)],
        snapshot=snapshot,
    )


class Check:
    """Sees the rows of all responses, which are numbered from 0, then the pairs; 15 bytes a response."""

    def __init__(self, n_responses: int):
        self.seen = {table: np.zeros(n_responses, np.uint8) for table in NOTES}
        self.notes = {table: np.zeros(n_responses, np.uint32) for table in NOTES}
        self.n_unfit, self.first = 0, {}

    def rows(self, table: str, numbers: np.ndarray, notes: np.ndarray) -> None:
        """Rows of the responses `numbers`, in any order, with what NOTES says of them."""
        np.add.at(self.seen[table], numbers, 1)
        self.notes[table][numbers] = notes

    def pairs(self, both: np.ndarray, lengths: dict[str, np.ndarray]) -> None:
        """The next pairs: response numbers [n, 2] of chosen and rejected, and as many list lengths of their prompt,
        response, teacher and reference."""
        seen = {table: s[both] for table, s in self.seen.items()}
        missing = {table: s == 0 for table, s in seen.items()}
        prompts = self.notes["samples"][both]
        facts = {
            "repeated": np.any([s > 1 for s in seen.values()], axis=0),
            "prompts_differ": np.repeat(prompts[:, :1] != prompts[:, 1:], 2, axis=1),
            "is_whole": self.notes["teacher_logits"][both] > 0,
        }
        n = lengths
        unfit = facts["repeated"] | facts["prompts_differ"] | ~facts["is_whole"] | np.any([*missing.values()], axis=0)
        unfit |= (n["prompt"] == 0) | (n["response"] == 0)
        unfit |= (n["teacher"] != n["response"]) | (n["reference"] != n["response"])
        self.n_unfit += int(unfit.sum())
        for which in (facts["repeated"], unfit):  # the worse first
            if which.any() and not (self.first and (self.first["repeated"] or which is unfit)):
                at = tuple(np.argwhere(which)[0])
                found = {name: values[at].item() for name, values in (facts | lengths).items()}
                self.first = found | {"missing": [t for t, m in missing.items() if m[at]], "number": int(both[at])}
                self.first["side"] = ("chosen", "rejected")[at[1]]

    def end(self, con: duckdb.DuckDBPyConnection, request: Request) -> None:
        """Raises TrainingError naming the first pair with a row that is missing, there twice, or of another length,
        and with two prompts. `con` has the tables members and responses of `rows.write_rows`."""
        if not self.first:
            return
        r = self.first
        pair, slice, sample = con.execute(
            f"SELECT pair_id, slice, sample_id FROM members JOIN responses ON sample_id = {r['side']}_id "
            "WHERE number = ? ORDER BY pair_id LIMIT 1",
            [r["number"]],
        ).fetchone()
        what, remedy = _problem(r, request.teacher_id, request.policy_id)
        raise TrainingError(
            f"pair {pair} of slice {slice!r}: its {r['side']} response, sample {sample}, has {what} at snapshot "
            f"{request.snapshot} ({self.n_unfit} responses that do not fit); {remedy}"
        )


def _problem(r: dict, teacher: str, reference: str) -> tuple[str, str]:
    """What is wrong with a response, and what to do about it."""
    if r["repeated"]:
        return "more than one samples, teacher_logits or reference_logprobs row", "delete the surplus rows"
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
    return what, "delete this sample's teacher_logits and reference_logprobs rows and materialise both again"
