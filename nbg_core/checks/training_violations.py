"""The queries of the checks of training and evaluation.

Shapes: B pairs of the first step.
"""

from __future__ import annotations

import math

import polars as pl

from nbg_core.base.ids import model_id
from nbg_core.base.names import find
from nbg_core.checks.violations import Subject
from nbg_core.evaluation.accuracy import latest_summary
from nbg_core.evaluation.promotion import gate_refusal
from nbg_core.lake.queries import checkpoint_row, require_materialisation
from nbg_core.lineage.policy import checkpoint_folder
from nbg_core.losses.dpo import DPO_VARIANTS
from nbg_core.reference import drift


def _newest_checkpoint(s: Subject) -> dict:
    """The row of `checkpoints` that the newest materialisation made."""
    return checkpoint_row(s.lake, require_materialisation(s.lake, "student_checkpoint", None)["data_version"])


def not_reference_at_step_0(s: Subject) -> pl.DataFrame:
    """The metrics of step 0 if its margin is not 0, or its DPO loss not log 2 where the variant's is at margin 0."""
    row = _newest_checkpoint(s)
    steps = s.sql(
        "SELECT step, margin, dpo FROM training_steps WHERE training_id = $1 AND step = 0", row["training_id"]
    )
    if steps.is_empty():
        return pl.DataFrame({"training_id": [row["training_id"]], "problem": ["no metrics of step 0"]})
    made = s.made_with()
    steps = steps.with_columns(allowed=pl.lit(_step_0_margin(s, row, made)))
    off = ~(pl.col("margin").abs() <= pl.col("allowed"))
    if find(DPO_VARIANTS, made["loss"]["dpo_variant"], "DPO variant").is_log_2_at_0:
        off |= ~((pl.col("dpo") - math.log(2)).abs() <= pl.col("allowed"))
    return steps.filter(off)


def _step_0_margin(s: Subject, checkpoint: dict, made: dict) -> float:
    """How far the mean margin of the first batch may be from 0, and its DPO loss from log 2.

    Each of a pair's two rewards is within its `step_0_bound` of 0, or training would have stopped. The margin, their
    difference, is therefore within the sum of the two bounds, and the mean margin within the mean of the sums. The same
    holds for the loss, because the slope of -log sigmoid is at most 1."""
    first = s.sql("SELECT pair_id FROM checkpoint_pairs WHERE training_id = $1 AND step = 0", checkpoint["training_id"])
    n_tokens = s.lake.sql(
        "SELECT len(c.token_ids) AS chosen, len(r.token_ids) AS rejected FROM pairs p "
        "JOIN samples c ON c.sample_id = p.chosen_id JOIN samples r ON r.sample_id = p.rejected_id "
        "WHERE p.pair_id IN (SELECT unnest($1::VARCHAR[]))",
        [first["pair_id"].to_list()],
        snapshot=checkpoint["input_snapshot"],
    )
    bounds = drift.step_0_bound(made["precision"], made["loss"]["beta"], n_tokens.to_numpy())  # [B, 2]
    return float(bounds.sum(1).mean()) if n_tokens.height else 0.0


def weights_missing(s: Subject) -> pl.DataFrame:
    """The newest checkpoint if its folder is missing, or holds a model with another id."""
    row = _newest_checkpoint(s)
    try:
        folder = checkpoint_folder(s.profile, row["path"])
        found, problem = model_id(folder), f"weights at {folder} are not those of the checkpoint"
    except (FileNotFoundError, ValueError) as e:
        found, problem = None, str(e)
    return pl.DataFrame({"checkpoint_id": [row["checkpoint_id"]], "problem": [problem]}).filter(
        found != row["checkpoint_id"]
    )


def training_set_lost(s: Subject) -> pl.DataFrame:
    """Pairs that the newest checkpoint was trained on and that are not in the lake at the snapshot it read."""
    row = _newest_checkpoint(s)
    used = s.sql("SELECT DISTINCT pair_id, slice FROM checkpoint_pairs WHERE training_id = $1", row["training_id"])
    known = s.lake.sql("SELECT pair_id FROM pairs", snapshot=row["input_snapshot"])
    lost = used.join(known, on="pair_id", how="anti").sort("pair_id")
    return lost if used.height else pl.DataFrame({"training_id": [row["training_id"]], "problem": ["no pair recorded"]})


def gate_refuses(s: Subject) -> pl.DataFrame:
    """The newest evaluated checkpoint if it may not be promoted, with the reason."""
    checkpoint, summary, _ = latest_summary(s.lake, profile=s.profile.name)
    refusal = gate_refusal(summary, s.profile.evaluation.min_queries)
    return pl.DataFrame({"checkpoint_id": [checkpoint], "why": [refusal]}).filter(refusal is not None)
