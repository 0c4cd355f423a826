"""`teacher_logits`: the teacher's distribution at every position of every response in a pair."""

import dagster as dg

from nbg_assets import plots
from nbg_assets.partitions import slices
from nbg_assets.pipes import check_specs, materialise
from nbg_assets.resources import NbgResource


@dg.asset(
    deps=["filtered_pairs"],
    group_name="distillation",
    kinds={"pytorch", "huggingface", "parquet"},
    partitions_def=slices,
    pool="model",
    check_specs=check_specs("teacher_logits"),
)
def teacher_logits(context: dg.AssetExecutionContext, nbg: NbgResource) -> dg.MaterializeResult:
    """The teacher, forced over the exact token ids of chosen and rejected: an exact head and a sampled tail per
    position. Query it entry by entry through the view `teacher_entries`."""
    return materialise(context, nbg, {"stored distribution": plots.entries_per_position})
