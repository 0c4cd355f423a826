"""The pairs to train on, checked: pairs, samples, teacher rows and reference log-probs at one snapshot.

Nothing is trained on that does not fit together: every response has its teacher row (this teacher, these storage
settings) and its reference row (this policy and dtype), once each, and all of them have one entry per response token.
Both responses of a pair answer one prompt, token by token.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from nbg_core.lake import Lake
from nbg_core.training.request import TrainingError

_RESPONSES = """
    WITH members AS (
      SELECT pair_id, slice, chosen_id AS sample_id, 0 AS side FROM pairs WHERE slice IN (SELECT unnest($1::VARCHAR[]))
      UNION ALL
      SELECT pair_id, slice, rejected_id, 1 FROM pairs WHERE slice IN (SELECT unnest($1::VARCHAR[]))),
    s AS (
      SELECT sample_id, len(token_ids) AS n_response, len(prompt_token_ids) AS n_prompt,
             hash(prompt_token_ids) AS prompt
      FROM samples SEMI JOIN members USING (sample_id)),
    t AS (
      SELECT sample_id, len(token_logprobs) AS n_teacher,
             len(head_counts) = n_teacher AND len(tail_counts) = n_teacher AND len(tail_logmass) = n_teacher
               AND len(entry_gaps) = len(entry_logprobs)
               AND len(entry_gaps) = list_sum(head_counts) + list_sum(tail_counts) AS is_whole
      FROM teacher_logits WHERE model_id = $2 AND settings_id = $3),
    r AS (SELECT sample_id, len(token_logprobs) AS n_reference FROM reference_logprobs
      WHERE model_id = $4 AND settings_id = $5),
    counted AS (
      SELECT m.*, n_response, n_prompt, n_teacher, is_whole, n_reference,
             count(*) OVER (PARTITION BY pair_id, side) > 1 AS repeated,
             min(prompt) OVER (PARTITION BY pair_id) <> max(prompt) OVER (PARTITION BY pair_id) AS prompts_differ
      FROM members m LEFT JOIN s USING (sample_id) LEFT JOIN t USING (sample_id) LEFT JOIN r USING (sample_id))
    SELECT *, count(*) OVER () AS n_bad FROM counted
    WHERE repeated OR n_response IS NULL OR n_teacher IS NULL OR n_reference IS NULL OR NOT is_whole
       OR n_response = 0 OR n_prompt = 0 OR prompts_differ OR n_response <> n_teacher OR n_response <> n_reference
    ORDER BY NOT repeated, pair_id, side LIMIT 1"""


def read_pairs(
    lake: Lake, snapshot: int, slices: Sequence[str], work: Path, *, teacher_id: str, storage_id: str,
    reference_id: str, scoring_id: str,
) -> pl.DataFrame:  # fmt: skip
    """The pairs in order of pair_id: pair_id, slice. Light: token ids and distributions stay where they are; what the
    joins cannot keep in memory goes to a folder below `work`.

    Raises TrainingError naming the first pair with a row that is missing, there twice, or of another length, and with
    two prompts."""
    params = [list(slices), teacher_id, storage_id, reference_id, scoring_id]
    with lake.joins(snapshot, work / f"spill-{uuid.uuid4().hex}") as con:
        bad = con.execute(_RESPONSES, params).pl()
        pairs = con.execute(
            "SELECT pair_id, slice FROM pairs WHERE slice IN (SELECT unnest(?::VARCHAR[])) ORDER BY pair_id",
            [list(slices)],
        ).pl()
    if not bad.is_empty():
        r = bad.row(0, named=True)
        what, remedy = _problem(r, teacher_id, reference_id)
        raise TrainingError(
            f"pair {r['pair_id']} of slice {r['slice']!r}: its {'rejected' if r['side'] else 'chosen'} response, "
            f"sample {r['sample_id']}, has {what} at snapshot {snapshot} "
            f"({r['n_bad']} responses that do not fit); {remedy}"
        )
    return pairs


def _problem(r: dict, teacher: str, reference: str) -> tuple[str, str]:
    """What is wrong with a response, and what to do about it."""
    if r["repeated"]:
        return "more than one teacher_logits or reference_logprobs row", "delete the surplus rows"
    missing = {
        "n_response": ("no samples row", "student_samples and filtered_pairs"),
        "n_teacher": (f"no teacher_logits row of teacher {teacher} with these storage settings", "teacher_logits"),
        "n_reference": (f"no reference_logprobs row of policy {reference} in this dtype", "reference_logprobs"),
    }
    for column, (what, asset) in missing.items():
        if r[column] is None:
            return what, f"materialise {asset} of this slice again"
    if r["prompts_differ"]:
        what = "other prompt_token_ids than the pair's other response"
        return what, "set another sampling.seed, so that all responses are drawn anew, and materialise this slice again"
    what = (
        f"{r['n_prompt']} prompt tokens, {r['n_response']} response tokens, {r['n_teacher']} teacher positions"
        f"{'' if r['is_whole'] else ' (damaged)'} and {r['n_reference']} reference log-probs"
    )
    return what, "delete this sample's teacher_logits and reference_logprobs rows and materialise both again"
