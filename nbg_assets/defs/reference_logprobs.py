"""`reference_logprobs`: the frozen reference's log-probs of the same tokens."""

import dagster as dg

from nbg_assets import plots
from nbg_assets.partitions import slices
from nbg_assets.pipes import check_specs, materialise
from nbg_assets.resources import NbgResource


@dg.asset(
    deps=["filtered_pairs"],
    group_name="distillation",
    kinds={"pytorch", "huggingface"},
    partitions_def=slices,
    pool="model",
    check_specs=check_specs("reference_logprobs"),
)
def reference_logprobs(context: dg.AssetExecutionContext, nbg: NbgResource) -> dg.MaterializeResult:
    """Log-probs of every chosen and rejected token under the policy that training starts from, which is the DPO
    reference: before the first step every margin is 0."""
    return materialise(context, nbg, {"sampler drift": plots.sampler_drift})
