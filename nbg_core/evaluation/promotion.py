"""The promotion gate, and promotion, which makes a model the policy that the next round samples from."""

from __future__ import annotations

from datetime import UTC, datetime

import polars as pl

from nbg_core.base.ids import model_id
from nbg_core.config.profile import Profile
from nbg_core.evaluation.accuracy import NotEvaluated, latest_summary
from nbg_core.evaluation.intervals import mcnemar_p_value
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import checkpoint_row
from nbg_core.lake.records import Record, Write
from nbg_core.lineage.policy import SFT, check_checkpoint

SIGNIFICANCE = 0.05
"""A difference whose p-value is below this counts as real."""


def gate_refusal(summary: pl.DataFrame, min_queries: int) -> str | None:
    """Why a checkpoint may not be promoted. None if it may: it must be better overall and worse on no slice.

    `summary` is a frame of `accuracy.summarise`. Differences are tested with McNemar's exact test, which holds at any
    n. Overall, the p-value must be below SIGNIFICANCE. A slice counts as worse if its p-value is below SIGNIFICANCE /
    number of slices (Bonferroni), since of many slices some look worse by chance. With fewer than `min_queries`
    held-out queries the answer is always no."""
    overall = summary.filter("is_overall").row(0, named=True)
    if overall["n"] < min_queries:
        return (
            f"only {overall['n']} held-out queries were answered by all models, and at least {min_queries} are needed; "
            "hold out more (queries.eval_fraction, or more query files), or lower evaluation.min_queries"
        )
    p_value = mcnemar_p_value(overall["fixed"], overall["broken"])
    if overall["difference"] <= 0 or p_value >= SIGNIFICANCE:
        return f"not better overall: {_what_changed(overall, p_value)}"
    slices = summary.filter(~pl.col("is_overall"))
    for row in slices.iter_rows(named=True):
        p_value = mcnemar_p_value(row["fixed"], row["broken"])
        if row["difference"] < 0 and p_value * slices.height < SIGNIFICANCE:
            return f"slice {row['slice']} is worse: {_what_changed(row, p_value)}"
    return None


def _what_changed(row: dict, p_value: float) -> str:
    return (
        f"difference {row['difference']:+.3f} ({row['fixed']} of {row['n']} queries fixed, {row['broken']} broken, "
        f"p = {p_value:.2g})"
    )


def promotion(lake: Lake, checkpoint: str, reason: str) -> Write:
    """The write that promotes a checkpoint. Raises LookupError for an unknown checkpoint."""
    row = checkpoint_row(lake, checkpoint)
    return Write("promotions", pl.DataFrame(
        [{"model_id": row["checkpoint_id"], "path": row["path"], "promoted_at": datetime.now(UTC), "reason": reason}]
    ))  # fmt: skip


def promotion_blocker(lake: Lake, checkpoint: str, min_queries: int) -> str | None:
    """The gate's reason against a checkpoint by its newest evaluation; None if it passed or was never evaluated.

    Raises LookupError for an unknown checkpoint, and for an evaluation whose queries have all changed since."""
    try:
        evaluated = latest_summary(lake, checkpoint_row(lake, checkpoint)["checkpoint_id"])
        return gate_refusal(evaluated.summary, min_queries)
    except NotEvaluated:
        return None


def promote(lake: Lake, profile: Profile, checkpoint: str, reason: str, run_id: str = "local") -> None:
    """Promote a checkpoint by hand; 'sft' makes the profile's SFT student the policy again.

    Raises LookupError for an unknown checkpoint, FileNotFoundError and ValueError as `check_checkpoint` does."""
    if checkpoint == SFT:
        row = {"model_id": model_id(profile.resolve(profile.models.student)), "path": SFT}
        write = Write("promotions", pl.DataFrame([row | {"promoted_at": datetime.now(UTC), "reason": reason}]))
    else:
        row = checkpoint_row(lake, checkpoint)
        check_checkpoint(profile, row["path"], row["checkpoint_id"])  # a policy that is not there would stop everything
        write = promotion(lake, checkpoint, reason)
    lake.commit(Record("promotion", None, run_id, profile.name), [write])
