"""The metrics of an optimizer step. A metric is one entry of METRICS, and everything else follows from it.

From an entry follow the sum over micro-batches and ranks, the column of `training_steps` with its description, the
value in each line of `steps.jsonl`, and the curve in the Dagster UI. A metric without an entry is an error.

Shapes: B pairs of a micro-batch, T response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from nbg_core.losses.dpo import DpoTerms

Count = Literal["pairs", "chosen_tokens", "rejected_tokens"]
"""What a mean can be over: a field of `joint.Denominators`."""


@dataclass(frozen=True)
class Terms:
    """What the metrics of a micro-batch are computed from. Values are float64.

    Tensors [B] and [B, 2] are of whole pairs. Tensors [T] are of this rank's rows, which with sequence parallelism are
    only some of the rows of these pairs."""

    policy_logps: Tensor
    """[B, 2]: log-probability of the whole chosen and the whole rejected response under the policy, nats."""
    dpo: DpoTerms
    margin: Tensor
    """[B]: implicit reward of the chosen minus that of the rejected, beta included."""
    kl: Tensor
    """[T]: divergence between teacher and student, nats; times temperature^2 if the loss has that factor."""
    is_chosen: Tensor
    """[T] bool."""


@dataclass(frozen=True)
class Metric:
    name: str
    """Column of `training_steps`."""
    meaning: str
    """Description of the column."""
    sum: Callable[[Terms], Tensor] | None = None
    """Gives a micro-batch's sum, a scalar. None: the training loop measures the metric once per step."""
    mean_over: Count | None = None
    """The count of the global batch that the sum is divided by."""
    of: Literal["pairs", "rows"] = "pairs"
    """What the sum is over: whole pairs, so that it is the same on all ranks of a sequence-parallel group, or the
    token rows that this rank has, which differ between ranks."""
    plot: str | None = None
    """Title of the figure that shows the metric's curve; metrics of the same title share a figure."""

    def __post_init__(self) -> None:
        """Raises ValueError for a sum without a count to divide it by, or the reverse."""
        if (self.sum is None) != (self.mean_over is None):
            raise ValueError(f"metric {self.name!r} needs both `sum` and `mean_over`, or neither")


METRICS: tuple[Metric, ...] = (
    Metric("loss", "joint loss", plot="losses"),
    Metric("dpo", "sequence-level DPO loss, mean over pairs", lambda t: t.dpo.loss.sum(), "pairs", plot="losses"),
    Metric("kl_chosen", "divergence to the teacher, mean over chosen tokens, nats; times temperature^2 if "
           "training.loss.scale_by_temperature_squared",
           lambda t: t.kl.where(t.is_chosen, 0.0).sum(), "chosen_tokens", of="rows", plot="losses"),
    Metric("kl_rejected", "divergence to the teacher, mean over rejected tokens, nats; times temperature^2 if "
           "training.loss.scale_by_temperature_squared",
           lambda t: t.kl.where(~t.is_chosen, 0.0).sum(), "rejected_tokens", of="rows", plot="losses"),
    Metric("nll", "negative log-likelihood, mean over chosen tokens, nats",
           lambda t: -t.policy_logps[:, 0].sum(), "chosen_tokens"),
    Metric("margin", "mean reward margin, beta included", lambda t: t.margin.sum(), "pairs",
           plot="margin and accuracy"),
    Metric("accuracy", "share of pairs with a positive margin (ties count half)",
           lambda t: ((t.margin > 0).double() + 0.5 * (t.margin == 0).double()).sum(), "pairs",
           plot="margin and accuracy"),
    Metric("chosen_reward", "mean implicit reward of the chosen", lambda t: t.dpo.chosen_reward.sum(), "pairs"),
    Metric("rejected_reward", "mean implicit reward of the rejected", lambda t: t.dpo.rejected_reward.sum(), "pairs"),
    Metric("chosen_logp", "mean sequence log-probability of the chosen, nats", lambda t: t.policy_logps[:, 0].sum(),
           "pairs", plot="log-probabilities"),
    Metric("rejected_logp", "mean sequence log-probability of the rejected, nats", lambda t: t.policy_logps[:, 1].sum(),
           "pairs", plot="log-probabilities"),
    Metric("grad_norm", "global gradient norm before clipping", plot="gradient norm"),
    Metric("learning_rate", "learning rate of this step"),
    Metric("tokens_per_second", "tokens through the student per second, all ranks"),
    Metric("data_wait", "share of the step's time that rank 0 waited for its data"),
)  # fmt: skip

SUMMED: tuple[Metric, ...] = tuple(m for m in METRICS if m.sum is not None)
"""Metrics that are summed over micro-batches and ranks, in the order in which they are added up."""

PLOTS: tuple[str, ...] = tuple(dict.fromkeys(m.plot for m in METRICS if m.plot))
"""Titles of the figures, in the order of METRICS."""


def check_metrics(names: Iterable[str]) -> None:
    """Raise ValueError unless the measured metrics `names` are exactly those of METRICS."""
    measured, declared = set(names), {m.name for m in METRICS}
    if measured != declared:
        undeclared = ", ".join(sorted(measured - declared)) or "none"
        missing = ", ".join(sorted(declared - measured)) or "none"
        raise ValueError(
            f"metrics of a training step that METRICS in nbg_core/losses/metrics.py does not declare: {undeclared}; "
            f"declared and not measured: {missing}. Declare what is measured and measure what is declared"
        )
