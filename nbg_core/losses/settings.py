"""Settings of the joint loss: as a profile has them (`LossConfig`), and as the loss functions need them
(`LossSettings`)."""

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
    """Section `training.loss`: the joint loss L = w_dpo L_DPO + w_pos L_pos + w_neg L_neg + nll_coef L_NLL.

    The temperature is not here, because it is that of the stored teacher rows (`teacher.temperature`); see
    LossSettings."""

    w_dpo: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the sequence-level DPO loss. A term of weight 0 is not trained on, but still reported."""
    w_pos: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the token-level divergence on chosen responses."""
    w_neg: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the token-level divergence on rejected responses, minimised as on chosen ones."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Inverse temperature of DPO, which scales the margins. `sigmoid_norm` divides them by the length and needs a
    larger one (5, say)."""
    dpo_variant: Annotated[str, OneOf("DPO variant", DPO_VARIANTS)] = "sigmoid"
    """DPO loss, a name in DPO_VARIANTS."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped preferences (cDPO)."""
    nll_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the negative log-likelihood of chosen responses (RPO's term), mean over the chosen tokens of the
    step."""
    divergence: Annotated[str, OneOf("divergence", DIVERGENCES)] = "forward"
    """Token-level divergence, a name in DIVERGENCES."""
    estimator: Estimator = "sampled_tail"
    """How the divergence is computed from stored entries. `sampled_tail`: forward KL only; unbiased, apart from
    rounding and from what teacher.epsilon leaves out. `bucket`: all tokens outside the top entries count as one
    outcome, which gives a lower bound."""
    jsd_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of divergence jsd."""
    scale_by_temperature_squared: bool = True
    """Multiply the divergence by teacher.temperature^2, so that the size of its gradient does not depend on the
    temperature (Hinton et al. 2015)."""

    @model_validator(mode="after")
    def _estimator_fits(self):
        if self.estimator == "sampled_tail" and DIVERGENCES[self.divergence].of_samples is None:
            raise ValueError(
                f"divergence {self.divergence!r} needs estimator 'bucket'; set training.loss.estimator to it, or "
                "training.loss.divergence to 'forward'"
            )
        check_label_smoothing(self.dpo_variant, self.label_smoothing)
        return self


class LossSettings(LossConfig):
    """Everything that the loss functions need: the section `training.loss`, and the temperature of the teacher rows.

    Raises ValueError (pydantic's ValidationError), naming setting and value, for an invalid value."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of both distributions in the divergence: that of the stored teacher rows. DPO and NLL are at 1."""
