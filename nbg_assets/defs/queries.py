"""`queries`: rows of a query file, validated, deduplicated, split, kept apart from the evaluation set."""

import dagster as dg

from nbg_assets.partitions import slices
from nbg_assets.pipes import check_specs, materialise
from nbg_assets.resources import NbgResource


@dg.asset(
    group_name="data",
    kinds={"duckdb", "polars"},
    partitions_def=slices,
    check_specs=check_specs("queries"),
)
def queries(context: dg.AssetExecutionContext, nbg: NbgResource) -> dg.MaterializeResult:
    """Validated, deduplicated queries of one file in `data/queries/`, split into training and held-out ones; no
    training query shares text with a held-out one. What was dropped is in `rejections`, with the reason."""
    return materialise(context, nbg)
