"""The training set in the lake: pairs joined with samples, teacher rows and reference log-probs at one snapshot.

Nothing is trained on that does not fit together: every response has its teacher row (this teacher, these storage
settings) and its reference row (this policy and dtype), and all of them have one entry per response token.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from nbg_core.lake import Lake
from nbg_core.training.request import TrainingError

_RESPONSES = """
    WITH members AS (
      SELECT pair_id, slice, chosen_id AS sample_id, 0 AS side FROM pairs WHERE slice IN (SELECT unnest($1::VARCHAR[]))
      UNION ALL
      SELECT pair_id, slice, rejected_id, 1 FROM pairs WHERE slice IN (SELECT unnest($1::VARCHAR[])))
    SELECT {columns}
    FROM members m
    LEFT JOIN samples s ON s.sample_id = m.sample_id
    LEFT JOIN teacher_logits t ON t.sample_id = m.sample_id AND t.model_id = $2 AND t.settings_id = $3
    LEFT JOIN reference_logprobs r ON r.sample_id = m.sample_id AND r.model_id = $4 AND r.settings_id = $5
    ORDER BY m.pair_id, m.side"""

_LENGTHS = """
    m.pair_id, m.slice, m.side, m.sample_id, len(s.prompt_token_ids) AS n_prompt, len(s.token_ids) AS n_response,
    len(t.token_logprobs) AS n_teacher, len(r.token_logprobs) AS n_reference,
    len(t.head_counts) = len(t.token_logprobs) AND len(t.tail_counts) = len(t.token_logprobs)
      AND len(t.tail_logmass) = len(t.token_logprobs) AND len(t.entry_ids) = len(t.entry_logprobs)
      AND len(t.entry_ids) = list_sum(t.head_counts) + list_sum(t.tail_counts) AS teacher_is_whole"""

_CONTENT = """
    m.pair_id, m.slice, m.side, m.sample_id, s.prompt_token_ids, s.token_ids, r.token_logprobs AS reference_logprobs,
    t.head_counts, t.tail_counts, t.tail_logmass, t.entry_ids, t.entry_logprobs"""


def read_pairs(
    lake: Lake,
    snapshot: int,
    slices: Sequence[str],
    *,
    teacher_id: str,
    storage_id: str,
    reference_id: str,
    scoring_id: str,
) -> pl.DataFrame:
    """The pairs in order of pair_id: pair_id, slice. Light: token ids and distributions stay where they are.

    Raises TrainingError naming the first pair with a row that is missing or of another length."""
    params = [list(slices), teacher_id, storage_id, reference_id, scoring_id]
    rows = lake.sql(_RESPONSES.format(columns=_LENGTHS), params, snapshot=snapshot)
    _check(rows, teacher_id, reference_id, snapshot)
    return rows.filter(pl.col("side") == 0).select("pair_id", "slice")


def read_responses(
    lake: Lake,
    snapshot: int,
    slices: Sequence[str],
    *,
    teacher_id: str,
    storage_id: str,
    reference_id: str,
    scoring_id: str,
) -> pl.DataFrame:
    """The responses of those pairs with all that training needs: chosen and rejected of the first pair, and so on."""
    params = [list(slices), teacher_id, storage_id, reference_id, scoring_id]
    return lake.sql(_RESPONSES.format(columns=_CONTENT), params, snapshot=snapshot)


def _check(rows: pl.DataFrame, teacher: str, reference: str, snapshot: int) -> None:
    repeated = rows.filter(pl.struct("pair_id", "side").is_duplicated())
    _refuse(repeated, snapshot, "more than one teacher_logits or reference_logprobs row", "delete the surplus rows")
    missing = {
        "n_response": ("no samples row", "student_samples and filtered_pairs"),
        "n_teacher": (f"no teacher_logits row of teacher {teacher} with these storage settings", "teacher_logits"),
        "n_reference": (f"no reference_logprobs row of policy {reference} in this dtype", "reference_logprobs"),
    }
    for column, (what, asset) in missing.items():
        _refuse(rows.filter(pl.col(column).is_null()), snapshot, what, f"materialise {asset} of this slice again")
    n = pl.col("n_response")
    wrong = rows.filter(
        (n == 0) | (n != pl.col("n_teacher")) | (n != pl.col("n_reference")) | ~pl.col("teacher_is_whole")
    )
    if wrong.height:
        r = wrong.row(0, named=True)
        what = (
            f"{r['n_response']} response tokens, {r['n_teacher']} teacher positions"
            f"{'' if r['teacher_is_whole'] else ' (damaged)'} and {r['n_reference']} reference log-probs"
        )
        remedy = "delete this sample's teacher_logits and reference_logprobs rows and materialise both again"
        _refuse(wrong, snapshot, what, remedy)


def _refuse(bad: pl.DataFrame, snapshot: int, what: str, remedy: str) -> None:
    if bad.is_empty():
        return
    r = bad.row(0, named=True)
    raise TrainingError(
        f"pair {r['pair_id']} of slice {r['slice']!r}: its {'rejected' if r['side'] else 'chosen'} response, sample "
        f"{r['sample_id']}, has {what} at snapshot {snapshot} ({bad.height} responses like this); {remedy}"
    )
