"""The queries of the lake that more than one module needs, each defined once.

*Newest* and *latest* always mean the highest snapshot id; clock times are never compared, since clocks may go back.
Frames have the columns that the docstring names, with the types of `tables`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from nbg_core.assets import partition_name
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Input

RESPONSES_OF_PAIRS = """(
    SELECT chosen_id AS sample_id FROM pairs WHERE slice = $1 UNION SELECT rejected_id FROM pairs WHERE slice = $1)"""
"""SQL of the responses of a slice's pairs, once each. Column: sample_id. $1 is the slice."""

CURRENT_SAMPLES = (
    "samples.sampling_id = $2 AND (samples.model_id = $3 AND samples.sample_index < $4 "
    "OR samples.model_id = $5 AND samples.sample_index < $6)"
)
"""SQL condition on `samples`: responses that the newest sampling of a slice asked for. It leaves out those of earlier
policies, other settings and a higher n, which stay in the table. $2 to $6 are `SampledWith.params`."""


@dataclass(frozen=True)
class SampledWith:
    """What the newest sampling of a slice was made with."""

    sampling_id: str
    student: str
    """Model id of the policy that sampled."""
    n_student: int
    teacher: str | None
    """Model id of the teacher, None when it sampled nothing."""
    n_teacher: int

    @property
    def params(self) -> list[object]:
        return [self.sampling_id, self.student, self.n_student, self.teacher, self.n_teacher]


def latest_materialisation(lake: Lake, asset: str, slice_name: str | None, snapshot: int | None = None) -> dict | None:
    """The newest complete materialisation of a partition (as of `snapshot`): a row of `lineage.commits`, or None."""
    rows = lake.sql(
        "SELECT * FROM lineage.commits WHERE asset = ? AND slice IS NOT DISTINCT FROM ? AND status = 'complete' "
        "AND snapshot_id <= coalesce(?, snapshot_id) ORDER BY snapshot_id DESC LIMIT 1",
        [asset, slice_name, snapshot],
    )
    return None if rows.is_empty() else rows.row(0, named=True)


def require_materialisation(lake: Lake, asset: str, slice_name: str | None, snapshot: int | None = None) -> dict:
    """`latest_materialisation`. Raises LookupError if there is none."""
    row = latest_materialisation(lake, asset, slice_name, snapshot)
    if row is None:
        raise LookupError(
            f"{partition_name(asset, slice_name)} has not been materialised; materialise it first (nbg run, or the UI)"
        )
    return row


def latest_materialisations(lake: Lake) -> dict[tuple[str, str | None], dict]:
    """(asset, slice name) -> the newest complete materialisation of every partition that has one: data_version,
    settings_id, settings (JSON), inputs (JSON), code_version, snapshot_id."""
    rows = lake.sql(
        "SELECT asset, slice, data_version, settings_id, settings, inputs, code_version, snapshot_id "
        "FROM lineage.commits WHERE status = 'complete' "
        "QUALIFY row_number() OVER (PARTITION BY asset, slice ORDER BY snapshot_id DESC) = 1"
    )
    return {(row["asset"], row["slice"]): row for row in rows.iter_rows(named=True)}


def made_with(lake: Lake, asset: str, slice_name: str | None, snapshot: int | None = None) -> dict:
    """The settings of a partition's newest complete materialisation, as `assets.settings_of` gave them.

    Raises LookupError if it was never materialised."""
    return json.loads(require_materialisation(lake, asset, slice_name, snapshot)["settings"])


def sampled_with(lake: Lake, slice_name: str, snapshot: int | None = None) -> SampledWith:
    """What the newest sampling of a slice was made with. Raises LookupError if it was never sampled completely."""
    settings = made_with(lake, "student_samples", slice_name, snapshot)
    return SampledWith(**{name: settings[name] for name in SampledWith.__dataclass_fields__})


def input_of(lake: Lake, asset: str, slice_name: str | None, snapshot: int) -> Input:
    """The input record for reading a partition at `snapshot`. Raises LookupError if it was not materialised by then."""
    return Input(
        asset, slice_name, require_materialisation(lake, asset, slice_name, snapshot)["data_version"], snapshot
    )


def current_samples(lake: Lake, slice_name: str, snapshot: int) -> pl.DataFrame:
    """The responses that a slice has now: those of the newest sampling to its training queries.

    Columns: sample_id, query_id, source, finish_reason, prompt_token_ids, token_ids, text, and of the query prompt,
    answer, verifier, verifier_args. Ordered by query, then sample. A response is found by its query, not by the slice
    that it was drawn in, which may have been renamed. Raises LookupError if the slice was never sampled completely."""
    return lake.sql(
        "SELECT samples.sample_id, samples.query_id, source, finish_reason, prompt_token_ids, token_ids, text, prompt, "
        "answer, verifier, verifier_args FROM samples JOIN queries USING (query_id) "
        f"WHERE queries.slice = $1 AND queries.split = 'train' AND {CURRENT_SAMPLES} ORDER BY query_id, sample_id",
        [slice_name, *sampled_with(lake, slice_name, snapshot).params],
        snapshot=snapshot,
    )


def samples_of_pairs(lake: Lake, slice_name: str, snapshot: int) -> pl.DataFrame:
    """The responses of every pair of a slice, once each. Columns: sample_id, prompt_token_ids, token_ids. Ordered by
    sample."""
    return lake.sql(
        f"SELECT sample_id, prompt_token_ids, token_ids FROM samples SEMI JOIN {RESPONSES_OF_PAIRS} USING (sample_id) "
        "ORDER BY sample_id",
        [slice_name],
        snapshot=snapshot,
    )


def scored_samples(lake: Lake, table: str, model_id: str, settings_id: str, sample_ids: Sequence[str]) -> pl.DataFrame:
    """Which of `sample_ids` have a row in `table` (`teacher_logits` or `reference_logprobs`) for this model and these
    settings. Column: sample_id."""
    return lake.sql(
        f"SELECT sample_id FROM {table} WHERE model_id = ? AND settings_id = ? "
        "AND sample_id IN (SELECT unnest(?::VARCHAR[]))",
        [model_id, settings_id, list(sample_ids)],
    )


def checkpoint_row(lake: Lake, checkpoint: str) -> dict:
    """The newest row of `checkpoints` for a checkpoint id, or for the only id that starts with `checkpoint`. Raises
    LookupError if there is none (the message names the known ones), or more than one."""
    rows = lake.sql("SELECT * FROM checkpoints ORDER BY snapshot_id DESC")
    found = rows.filter(pl.col("checkpoint_id").str.starts_with(checkpoint))
    if rows.is_empty() or (checkpoint and found.is_empty()):
        known = ", ".join(reversed(rows["checkpoint_id"].unique(maintain_order=True)))
        raise LookupError(f"no checkpoint {checkpoint!r}; known: {known or 'none yet'}")
    whole = only_one(checkpoint, sorted(set(found["checkpoint_id"])), "checkpoint")
    return found.filter(pl.col("checkpoint_id") == whole).row(0, named=True)


def only_one(start: str, found: Sequence[str], what: str) -> str:
    """`start` if it is in `found`, else the only element of `found`. Raises LookupError if there is none, or several;
    `what` is the kind of id, for the message."""
    if not start or not found:
        raise LookupError(f"no {what} has an id that starts with {start!r}" if start else f"give the id of a {what}")
    if start not in found and len(found) > 1:
        raise LookupError(
            f"{start!r} is the beginning of {len(found)} ids, {found[0]} and {found[1]} among them; give more of it"
        )
    return start if start in found else found[0]
