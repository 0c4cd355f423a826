"""The sequence-level DPO loss, in the variants that a profile can name (`training.loss.dpo_variant`).

A variant is an entry of DPO_VARIANTS: a function of the margin d = r+ - r- of a pair, where r = beta * (log p_policy -
log p_reference) is a response's implicit reward, r+ the chosen's and r- the rejected's. `ipo` compares sums over the
response, as published (TRL averages over tokens there). `sigmoid_norm` is `sigmoid` with rewards divided by length.

torch is imported only inside functions, because reading a profile checks names against DPO_VARIANTS and must not import
it.

Shapes: B pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbg_core.base.names import find
from nbg_core.losses.logps import upcast

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DpoVariant:
    """A DPO loss as a function of the margin."""

    name: str
    """Value of `training.loss.dpo_variant`."""
    meaning: str
    loss: Callable[[Tensor, float, float], Tensor]
    """(margin [B], beta, label_smoothing) -> loss [B]."""
    per_token: bool = False
    """Whether rewards are divided by the number of response tokens before they are compared."""
    takes_label_smoothing: bool = False
    """Whether the loss uses label_smoothing; if not, a value above 0 is an error."""
    is_log_2_at_0: bool = False
    """Whether the loss at margin 0 is log 2, whatever the label smoothing. If so, the check `starts_at_reference`
    compares the first step with it."""


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d), e = `label_smoothing` (arXiv 2305.18290; cDPO)."""
    from torch.nn.functional import logsigmoid

    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def ipo_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(d / beta - 1 / (2 beta))^2 (arXiv 2310.12036)."""
    return ((margin - 0.5) / beta).square()


def hinge_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """max(0, 1 - d) (SLiC, arXiv 2305.10425)."""
    return (1 - margin).relu()


DPO_VARIANTS: dict[str, DpoVariant] = {
    v.name: v
    for v in (
        DpoVariant("sigmoid", "DPO as published; cDPO with label_smoothing", sigmoid_loss,
                   takes_label_smoothing=True, is_log_2_at_0=True),
        DpoVariant("sigmoid_norm", "sigmoid with rewards per token", sigmoid_loss, per_token=True,
                   takes_label_smoothing=True, is_log_2_at_0=True),
        DpoVariant("ipo", "squared distance of margin / beta from 1 / (2 beta)", ipo_loss),
        DpoVariant("hinge", "max(0, 1 - margin)", hinge_loss),
    )
}  # fmt: skip


@dataclass(frozen=True)
class DpoTerms:
    """What `sequence_dpo_loss` returns for B pairs; nothing is reduced over pairs."""

    loss: Tensor
    """[B], differentiable."""
    chosen_reward: Tensor
    """[B], detached: implicit reward of the chosen, divided by its length if the variant is `per_token`."""
    rejected_reward: Tensor
    """[B], detached: the same for the rejected."""


def sequence_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    variant: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> DpoTerms:
    """The DPO loss of each pair and the rewards that it compares; nothing is reduced over pairs.

    policy_* and reference_* [B] are log-probabilities in nats, summed (not averaged) over the response; lengths [B] are
    in tokens. Computed in float32 (float64 for float64 inputs). Raises ValueError for an unknown variant, beta <= 0,
    label smoothing outside [0, 0.5) or with a variant that takes none, and a variant `per_token` without lengths."""
    dpo_variant = find(DPO_VARIANTS, variant, "DPO variant")
    check_label_smoothing(variant, label_smoothing)
    if not beta > 0:
        raise ValueError(f"beta={beta}: the inverse temperature of DPO must be above 0")
    chosen = beta * (upcast(policy_chosen) - upcast(reference_chosen))  # [B]
    rejected = beta * (upcast(policy_rejected) - upcast(reference_rejected))  # [B]
    if dpo_variant.per_token:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"variant={variant!r} needs chosen_lengths and rejected_lengths: pass both, in tokens")
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    return DpoTerms(dpo_variant.loss(chosen - rejected, beta, label_smoothing), chosen.detach(), rejected.detach())


def check_label_smoothing(variant: str, label_smoothing: float) -> None:
    """Raise ValueError for label smoothing outside [0, 0.5), or above 0 with a variant that takes none."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing}: it is a share of flipped preferences, from 0 to below 0.5"
        )
    if label_smoothing and not find(DPO_VARIANTS, variant, "DPO variant").takes_label_smoothing:
        raise ValueError(f"label_smoothing has no meaning with dpo_variant {variant!r}; set it to 0")
