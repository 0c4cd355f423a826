"""Views of the lake: name -> SQL, in which `{lake}` is the name that the lake is attached under and `{zero}` is
GAP_ZERO."""

from __future__ import annotations

VIEWS = {
    "teacher_entries": """
        WITH p AS (
          SELECT sample_id, model_id, settings_id, slice, unnest(range(len(head_counts))) AS position,
                 unnest(head_counts) AS n_head, unnest(tail_counts) AS n_tail, unnest(tail_logmass) AS logmass
          FROM {lake}.teacher_logits),
        owners AS (
          SELECT *, unnest(range(n_head + n_tail)) AS i FROM p),
        o AS (
          SELECT *, i < n_head AS is_head,
                 row_number() OVER (PARTITION BY sample_id, model_id, settings_id ORDER BY position, i) AS entry
          FROM owners),
        e AS (
          SELECT sample_id, model_id, settings_id, unnest(range(1, len(entry_gaps) + 1)) AS entry,
                 unnest(entry_gaps) AS gap, unnest(entry_logprobs) AS logprob
          FROM {lake}.teacher_logits)
        SELECT sample_id, model_id, settings_id, slice, position, is_head,
               (sum(gap - {zero}) OVER (PARTITION BY sample_id, model_id, settings_id, position, is_head ORDER BY i)
                 )::INTEGER AS token_id,
               logprob, CASE WHEN is_head THEN exp(logprob) ELSE exp(logmass) / n_tail END AS weight
        FROM o JOIN e USING (sample_id, model_id, settings_id, entry)""",
    "lineage.commits": """
        SELECT m.*, m.snapshot_id, s.snapshot_time
        FROM {lake}.lineage.materialisations m
        LEFT JOIN ducklake_snapshots('{lake}') s ON s.snapshot_id = m.snapshot_id""",
}
