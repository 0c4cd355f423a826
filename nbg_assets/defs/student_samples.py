"""`student_samples`: n responses per training query from the current policy, as token ids."""

import dagster as dg

from nbg_assets import plots
from nbg_assets.partitions import slices
from nbg_assets.pipes import check_specs, materialise
from nbg_assets.resources import NbgResource


@dg.asset(
    deps=["queries"],
    group_name="preferences",
    kinds={"pytorch", "huggingface"},
    partitions_def=slices,
    pool="model",
    check_specs=check_specs("student_samples"),
)
def student_samples(context: dg.AssetExecutionContext, nbg: NbgResource) -> dg.MaterializeResult:
    """Responses of the promoted policy (the SFT student before the first promotion) and, as a setting, of the teacher,
    to every training query: token ids, log-probs, finish reason. Only missing responses are drawn."""
    return materialise(context, nbg, {"response lengths": plots.response_lengths})
