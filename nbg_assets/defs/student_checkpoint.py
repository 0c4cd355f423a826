"""`student_checkpoint`: the student after Dual Preference Distillation on the pairs of all slices."""

import dagster as dg

from nbg_assets import plots
from nbg_assets.pipes import check_specs, materialise
from nbg_assets.resources import NbgResource


@dg.asset(
    deps=["filtered_pairs", "teacher_logits", "reference_logprobs"],
    group_name="student",
    kinds={"pytorch", "deepspeed", "huggingface"},
    pool="model",
    check_specs=check_specs("student_checkpoint"),
)
def student_checkpoint(context: dg.AssetExecutionContext, nbg: NbgResource) -> dg.MaterializeResult:
    """Weights (safetensors) trained with DeepSpeed on DPO plus the divergence to the teacher on chosen and rejected,
    over all slices. The lake keeps the snapshot it read and which pair was used at which step."""
    return materialise(
        context,
        nbg,
        {
            "losses": plots.losses,
            "log-probabilities": plots.log_probabilities,
            "margin and accuracy": plots.margin_and_accuracy,
            "gradient norm": plots.gradient_norm,
        },
    )
