"""`filtered_pairs`: the pairs where positive >> negative, and every rejection with its reason."""

import dagster as dg

from nbg_assets import plots
from nbg_assets.partitions import slices
from nbg_assets.pipes import check_specs, materialise
from nbg_assets.resources import NbgResource


@dg.asset(
    deps=["queries", "student_samples"],
    group_name="preferences",
    kinds={"duckdb", "polars"},
    partitions_def=slices,
    pool="model",
    check_specs=check_specs("filtered_pairs"),
)
def filtered_pairs(context: dg.AssetExecutionContext, nbg: NbgResource) -> dg.MaterializeResult:
    """Scored responses and the pairs whose margin is at least `preference.min_margin`. What was not kept is in
    `rejections`, with the reason."""
    return materialise(context, nbg, {"scores": plots.scores, "margins": plots.margins})
