"""The responses a slice has now: of its training queries, by the models and settings of its latest sampling."""

from __future__ import annotations

import json

import polars as pl

from nbg_core.run import Run


def current_samples(run: Run, slice: str, snapshot: int) -> pl.DataFrame:
    """The current responses with what scores them (answer, verifier, verifier_args, prompt), by query, then sample.

    Older ones (of an earlier policy, other settings, a higher n, a query that is gone) stay in the lake and out of
    this. Responses are found by their query, not by the slice they were drawn in, which may have been renamed.
    Raises LookupError if the slice was never sampled completely."""
    latest = run.lake.sql(
        "SELECT settings FROM lineage.materialisations WHERE asset = 'student_samples' AND slice = ? "
        "AND status = 'complete' ORDER BY created_at DESC LIMIT 1",
        [slice],
        snapshot=snapshot,
    )
    if latest.is_empty():
        raise LookupError(f"student_samples[{slice}] has not been materialised; materialise it first")
    s = json.loads(latest.item())
    return run.lake.sql(
        "SELECT s.sample_id, s.query_id, s.source, s.finish_reason, s.prompt_token_ids, s.token_ids, s.text, q.prompt, "
        "q.answer, q.verifier, q.verifier_args FROM samples s JOIN queries q USING (query_id) "
        "WHERE q.slice = $1 AND q.split = 'train' AND s.sampling_id = $2 "
        "AND (s.model_id = $3 AND s.sample_index < $4 OR s.model_id = $5 AND s.sample_index < $6) "
        "ORDER BY s.query_id, s.sample_id",
        [slice, s["sampling_id"], s["student"], s["n_student"], s["teacher"], s["n_teacher"]],
        snapshot=snapshot,
    )
