"""Accuracy on held-out queries, per slice and over all, with 95% intervals.

Wilson's interval for an accuracy, and Tango's for a difference of two accuracies (module `intervals`), which is paired
because all models answer the same queries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

import polars as pl

from nbg_core.evaluation.intervals import paired_difference, wilson
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import checkpoint_row
from nbg_core.scorers.verifiers import scorer_ids

OVERALL = "overall"
"""Value of column `slice` in the row over all slices. Column `is_overall` tells that row from a slice of this name."""
OVERALL_BESIDE = "overall (all slices)"
"""The value instead of OVERALL if a slice has that name."""


class NotEvaluated(LookupError):
    """The checkpoint has no complete evaluation."""


class Evaluated(NamedTuple):
    """The newest evaluation of a checkpoint."""

    checkpoint: str
    """Checkpoint id."""
    summary: pl.DataFrame
    """See `summarise`."""
    profile: str
    """Name of the profile that it was made with."""


def latest_summary(lake: Lake, checkpoint: str | None = None, *, profile: str | None = None) -> Evaluated:
    """The newest evaluation of a checkpoint, summarised over the queries and with the settings that it was made with.

    Without `checkpoint`, it is the one that the profile named `profile` evaluated last, else the one that any profile
    evaluated last. Raises NotEvaluated if there is none, and LookupError if no held-out query was answered by all
    the models."""
    rows = lake.sql(
        "SELECT profile, inputs, settings FROM lineage.commits WHERE asset = 'student_eval' AND status = 'complete' "
        "ORDER BY profile IS NOT DISTINCT FROM ? DESC, snapshot_id DESC",
        [profile],
    )
    for by, inputs, settings in rows.iter_rows():
        read = next(i for i in json.loads(inputs) if i["asset"] == "student_checkpoint")
        if checkpoint in (None, read["data_version"]):
            checkpoint, made_by, made_with = read["data_version"], by, json.loads(settings)
            break
    else:
        what = f"checkpoint {checkpoint} is not" if checkpoint else "nothing is"
        raise NotEvaluated(f"{what} evaluated yet; materialise student_eval first (nbg run, or the UI)")
    parent = checkpoint_row(lake, checkpoint)["parent_model_id"]
    models = {"before": parent, "after": checkpoint, "teacher": made_with["teacher"]}
    return Evaluated(checkpoint, summarise(lake, made_with["answering_id"], models, read["snapshot"]), made_by)


def summarise(lake: Lake, answering_id: str, models: dict[str, str], snapshot: int | None = None) -> pl.DataFrame:
    """Accuracy per slice and, in the last row, over all slices.

    `models` is role -> model id, with the roles 'before' (training), 'after' and 'teacher'. Columns: slice; is_overall;
    n, the number of queries; for each role ROLE, ROLE_low and ROLE_high, its accuracy and 95% interval; fixed, queries
    that 'after' got right and 'before' wrong; broken, the reverse; difference, difference_low and difference_high, the
    accuracy of 'after' minus that of 'before' and its 95% interval.

    A query counts if it is held out at `snapshot` (default: the newest), all models have answered it, and the answers
    were verified with the verifier and reference answer that it has there. Raises LookupError if there is none."""
    queries = lake.sql(
        "SELECT query_id, verifier, answer, verifier_args FROM queries WHERE split = 'eval' AND verifier IS NOT NULL",
        snapshot=snapshot,
    )
    answers = lake.sql(
        "SELECT model_id, query_id, scorer_id, slice, correct FROM evaluations WHERE settings_id = ? ORDER BY query_id",
        [answering_id],
    ).join(queries.with_columns(scorer_ids(queries)), on=["query_id", "scorer_id"], how="semi")
    wide = None
    for role, model in models.items():
        one = answers.filter(pl.col("model_id") == model).select("query_id", "slice", pl.col("correct").alias(role))
        wide = one if wide is None else wide.join(one.drop("slice"), on="query_id", how="inner")
    if wide is None or wide.is_empty():
        raise LookupError("no held-out query was answered by all the models; materialise student_eval again")
    names = wide["slice"].unique().sort().to_list()
    groups = [(name, wide.filter(pl.col("slice") == name)) for name in names]
    rows = [_row(name, group, models) for name, group in groups]
    total = OVERALL_BESIDE if OVERALL in names else OVERALL
    return pl.DataFrame([*rows, _row(total, wide, models) | {"is_overall": True}])


def _row(name: str, group: pl.DataFrame, roles: Iterable[str]) -> dict:
    n = group.height
    row = {"slice": name, "is_overall": False, "n": n}
    for role in roles:
        low, high = wilson(int(group[role].sum()), n)
        row |= {role: group[role].mean(), f"{role}_low": low, f"{role}_high": high}
    fixed = int((group["after"] & ~group["before"]).sum())
    broken = int((group["before"] & ~group["after"]).sum())
    low, high = paired_difference(fixed, broken, n)
    return row | {"fixed": fixed, "broken": broken, "difference": (fixed - broken) / n, "difference_low": low,
                  "difference_high": high}  # fmt: skip
