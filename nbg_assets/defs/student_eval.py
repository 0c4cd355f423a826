"""`student_eval`: held-out accuracy before and after, with intervals; the gate for promotion."""

import dagster as dg

from nbg_assets import plots
from nbg_assets.pipes import check_specs, materialise
from nbg_assets.resources import NbgResource


@dg.asset(
    deps=["queries", "student_checkpoint"],
    group_name="student",
    kinds={"pytorch", "huggingface"},
    pool="model",
    check_specs=check_specs("student_eval"),
)
def student_eval(context: dg.AssetExecutionContext, nbg: NbgResource) -> dg.MaterializeResult:
    """Accuracy on the held-out queries of every slice: the model before training, after it, and the teacher. The
    checkpoint may be promoted when it is better overall and worse on no slice, beyond noise."""
    return materialise(context, nbg, {"accuracy": plots.accuracies})
