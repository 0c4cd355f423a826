"""Settings of the joint loss. `LossConfig` is the section `training.loss` of a profile."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from nbg_core.base.names import OneOf
from nbg_core.base.section import Section
from nbg_core.losses.divergence import DIVERGENCES
from nbg_core.losses.dpo import DPO_VARIANTS, check_label_smoothing

Estimator = Literal["sampled_tail", "bucket"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)


class LossConfig(Section):
    w_dpo: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the sequence-level DPO term; a term of weight 0 is reported and not trained on."""
    w_pos: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the token-level divergence on the chosen."""
    w_neg: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the token-level divergence on the rejected."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """DPO inverse temperature."""
    dpo_variant: Annotated[str, OneOf("DPO variant", DPO_VARIANTS)] = "sigmoid"
    """DPO loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped preferences (cDPO)."""
    nll_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen's negative log-likelihood per token (RPO anchor)."""
    divergence: Annotated[str, OneOf("divergence", DIVERGENCES)] = "forward"
    """Token-level divergence between teacher and student; forward is KL(teacher || student)."""
    estimator: Estimator = "sampled_tail"
    """`sampled_tail`: unbiased forward KL; `bucket`: everything outside the top entries is one outcome."""
    jsd_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Teacher's weight in the generalised Jensen-Shannon mixture."""
    scale_by_temperature_squared: bool = True
    """Multiply the divergence by temperature^2, so that its gradient keeps its size (Hinton et al. 2015)."""

    @model_validator(mode="after")
    def _estimator_fits(self):
        if self.estimator == "sampled_tail" and DIVERGENCES[self.divergence].of_samples is None:
            raise ValueError(f"divergence {self.divergence!r} needs estimator 'bucket'")
        check_label_smoothing(self.dpo_variant, self.label_smoothing)
        return self


class LossSettings(LossConfig):
    """Settings of the joint loss: those of a profile, and the temperature that the teacher's rows were stored at.

    Raises ValueError (pydantic's ValidationError), naming setting and value, for values that make no sense."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the divergence, the one the teacher was stored at; DPO and NLL are always at 1."""
