"""Accuracy with intervals, the promotion gate, and promotion: what is said of evaluated answers.

Intervals: Wilson (1927) for one accuracy; for a difference, the normal interval of the per-query differences, paired
because all models answer the same queries.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime

import polars as pl

from nbg_core import lineage
from nbg_core.config import Profile
from nbg_core.lake import Lake, Record, Write

Z = 1.959964


def latest_summary(lake: Lake, profile: Profile) -> tuple[str, pl.DataFrame]:
    """The newest evaluated checkpoint's id, and its summary. Raises LookupError before the first evaluation."""
    row = lineage.latest(lake, "student_eval", None)
    if row is None:
        raise LookupError("nothing is evaluated yet; materialise student_eval first (nbg run, or the UI)")
    checkpoint = next(i["data_version"] for i in json.loads(row["inputs"]) if i["asset"] == "student_checkpoint")
    parent = checkpoint_row(lake, checkpoint)["parent_model_id"]
    teacher = json.loads(row["settings"])["teacher"]
    models = {"before": parent, "after": checkpoint, "teacher": teacher}
    return checkpoint, summarise(lake, profile.answering_id(), models)


def summarise(lake: Lake, settings: str, models: dict[str, str]) -> pl.DataFrame:
    """Accuracy per slice and over all ('overall'), for `models`: {'before', 'after', 'teacher'} -> model id.

    Columns: slice, n, and for each role its accuracy, low, high (95%); difference, difference_low, difference_high of
    after - before. Only queries that are held out today count."""
    answers = lake.sql(
        "SELECT e.model_id, e.query_id, e.slice, e.correct FROM evaluations e JOIN queries q USING (query_id) "
        "WHERE q.split = 'eval' AND e.settings_id = ? ORDER BY query_id",
        [settings],
    )
    wide = None
    for role, model in models.items():
        one = answers.filter(pl.col("model_id") == model).select("query_id", "slice", pl.col("correct").alias(role))
        wide = one if wide is None else wide.join(one.drop("slice"), on="query_id", how="inner")
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


def promote(lake: Lake, profile: Profile, checkpoint: str, reason: str, run_id: str = "local") -> None:
    """Make a checkpoint the policy that samples next. Raises LookupError for an unknown checkpoint."""
    row = checkpoint_row(lake, checkpoint)
    rows = pl.DataFrame(
        [{"model_id": row["checkpoint_id"], "path": row["path"], "promoted_at": datetime.now(UTC), "reason": reason}]
    )
    lake.commit(Record("promotion", None, run_id, profile.name), [Write("promotions", rows)])


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
