"""Accuracy with intervals, the promotion gate, and promotion: what is said of evaluated answers.

Intervals: Wilson (1927) for one accuracy; for a difference, the normal interval of the per-query differences, paired
because all models answer the same queries.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import NamedTuple

import polars as pl

from nbg_core import lineage
from nbg_core.config import Profile
from nbg_core.ids import model_id
from nbg_core.lake import Lake, Record, Write
from nbg_core.preference.verifiers import scorer_ids

Z = 1.959964


class Evaluated(NamedTuple):
    """A checkpoint's newest evaluation: see `summarise`, and the name of the profile that it was made with."""

    checkpoint: str
    summary: pl.DataFrame
    profile: str


def latest_summary(lake: Lake, checkpoint: str | None = None, *, profile: str | None = None) -> Evaluated:
    """Of the checkpoint given, else of the newest that the profile of this name has evaluated, else of the newest of
    all: its summary over the queries and with the settings of its newest evaluation.

    Raises LookupError before the first evaluation."""
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
        raise LookupError(f"{what} evaluated yet; materialise student_eval first (nbg run, or the UI)")
    parent = checkpoint_row(lake, checkpoint)["parent_model_id"]
    models = {"before": parent, "after": checkpoint, "teacher": made_with["teacher"]}
    return Evaluated(checkpoint, summarise(lake, made_with["answering_id"], models, read["snapshot"]), made_by)


def summarise(lake: Lake, answering_id: str, models: dict[str, str], snapshot: int | None = None) -> pl.DataFrame:
    """Accuracy per slice and over all ('overall'), for `models`: {'before', 'after', 'teacher'} -> model id.

    Columns: slice, n, and for each role its accuracy, low, high (95%); difference, difference_low, difference_high of
    after - before. Only queries held out at `snapshot` (now) count, and answers verified as those queries then say.
    Raises LookupError when there is none that all the models have answered."""
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
    if wide.is_empty():
        raise LookupError("no held-out query has an answer of all the models; materialise student_eval again")
    groups = [(s, wide.filter(pl.col("slice") == s)) for s in wide["slice"].unique().sort()]
    rows = []
    for name, group in [*groups, ("overall", wide)]:
        row = {"slice": name, "n": group.height}
        for role in models:
            low, high = wilson(int(group[role].sum()), group.height)
            row |= {role: group[role].mean(), f"{role}_low": low, f"{role}_high": high}
        difference = group["after"].cast(pl.Float64) - group["before"].cast(pl.Float64)
        half = Z * (difference.std() or 0.0) / math.sqrt(group.height)
        mean = difference.mean()
        rows.append(row | {"difference": mean, "difference_low": mean - half, "difference_high": mean + half})
    return pl.DataFrame(rows)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def gate(summary: pl.DataFrame) -> str | None:
    """Why a checkpoint may not be promoted, or None: better overall, no slice worse, both beyond noise."""
    overall = summary.filter(pl.col("slice") == "overall").row(0, named=True)
    if overall["difference_low"] <= 0:
        return f"not better overall: difference {overall['difference']:+.3f}, 95% from {overall['difference_low']:+.3f}"
    for row in summary.filter(pl.col("slice") != "overall").iter_rows(named=True):
        if row["difference_high"] < 0:
            return f"slice {row['slice']} is worse: difference {row['difference']:+.3f}"
    return None


def promotion(lake: Lake, checkpoint: str, reason: str) -> Write:
    """The row that makes a checkpoint the policy that samples next. Raises LookupError for an unknown checkpoint."""
    row = checkpoint_row(lake, checkpoint)
    return Write("promotions", pl.DataFrame(
        [{"model_id": row["checkpoint_id"], "path": row["path"], "promoted_at": datetime.now(UTC), "reason": reason}]
    ))  # fmt: skip


def objection(lake: Lake, checkpoint: str) -> str | None:
    """Why its last evaluation speaks against promoting a checkpoint; None if it does not, or there is none."""
    try:
        return gate(latest_summary(lake, checkpoint_row(lake, checkpoint)["checkpoint_id"]).summary)
    except LookupError:
        return None


def promote(lake: Lake, profile: Profile, checkpoint: str, reason: str, run_id: str = "local") -> None:
    """Promote a checkpoint by hand; `sft` goes back to the profile's student.

    Raises LookupError for an unknown checkpoint."""
    if checkpoint == lineage.SFT:
        row = {"model_id": model_id(profile.resolve(profile.models.student)), "path": lineage.SFT}
        write = Write("promotions", pl.DataFrame([row | {"promoted_at": datetime.now(UTC), "reason": reason}]))
    else:
        write = promotion(lake, checkpoint, reason)
    lake.commit(Record("promotion", None, run_id, profile.name), [write])


def checkpoint_row(lake: Lake, checkpoint: str) -> dict:
    """The newest row of `checkpoints` of this id, or of the only one that starts so. Raises LookupError otherwise,
    naming those known."""
    rows = lake.sql("SELECT * FROM checkpoints ORDER BY created_at DESC")
    found = rows.filter(pl.col("checkpoint_id").str.starts_with(checkpoint))
    if rows.is_empty() or (checkpoint and found.is_empty()):
        known = ", ".join(reversed(rows["checkpoint_id"].unique(maintain_order=True)))
        raise LookupError(f"no checkpoint {checkpoint!r}; known: {known or 'none yet'}")
    whole = lineage.only_one(checkpoint, sorted(set(found["checkpoint_id"])), "checkpoint")
    return found.filter(pl.col("checkpoint_id") == whole).row(0, named=True)
