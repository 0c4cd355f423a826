"""The joint loss of Dual Preference Distillation: L = w_dpo * L_DPO + w_pos * L_pos + w_neg * L_neg.

Pure functions from logits to losses. L_DPO compares whole responses (sums over tokens, mean over pairs). L_pos and
L_neg are the divergence between teacher and student at each token of the chosen and of the rejected response (mean
over tokens, each side its own count). Means are over the global batch: `joint_loss` divides by counts of the whole
optimizer step, so the contributions of micro-batches and ranks add up to the loss of one big batch.

Choices that the published method leaves open: forward KL(teacher || student), beta 0.1, temperature 1.

Shapes: T response tokens of a micro-batch, all responses concatenated; V vocabulary; K stored teacher entries of the
widest position; B pairs. Every [T, ...] array is already shifted: row t of the logits predicts token_ids[t], and prompt
and padding rows are not there. Half-precision logits are computed in float32; float64 stays float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nbg_core.losses.dpo import sequence_dpo_loss
from nbg_core.losses.logps import gather_logps, log_sum_exp, upcast
from nbg_core.losses.metrics import SUMMED, Terms
from nbg_core.losses.settings import LossSettings
from nbg_core.losses.targets import TeacherTargets
from nbg_core.losses.token_divergence import tail_logps, token_divergence


@dataclass(frozen=True)
class Denominators:
    """Counts of the global batch: all ranks, all accumulation steps. Raises ValueError unless all are positive."""

    pairs: int
    chosen_tokens: int
    rejected_tokens: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value}: count the whole optimizer step, all ranks and micro-batches of it")


def joint_loss(
    logits: Tensor,
    token_ids: Tensor,
    pair_index: Tensor,
    is_chosen: Tensor,
    reference_logps: Tensor,
    targets: TeacherTargets,
    n_pairs: int,
    *,
    settings: LossSettings,
    denominators: Denominators,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the joint loss (a scalar that adds up over micro-batches and ranks), and its sums.

    logits [T, V], token_ids [T] int64, pair_index [T] int64 in [0, n_pairs), is_chosen [T] bool, reference_logps [T]
    float (of token_ids, at temperature 1), targets of T rows; all already shifted, rows in any order. A pair lies
    whole in one micro-batch. The loss is float32, or float64 if the logits are:
    w_dpo * sum(dpo) / pairs + w_pos * sum(kl of chosen) / chosen_tokens + w_neg * sum(kl of rejected) / rejected_tokens
    + nll_coef * sum(nll of chosen) / chosen_tokens. Without rows it is a zero that can be differentiated.

    The sums are detached float64 scalars, to be added over micro-batches and ranks before dividing: dpo, margin,
    accuracy (a tie is half), chosen_reward, rejected_reward, chosen_logp, rejected_logp (of whole responses) over
    pairs; kl_chosen and nll over chosen_tokens; kl_rejected over rejected_tokens; and these three counts. KL sums are
    as the loss has them, temperature^2 included. Terms of weight 0 are reported, but reach neither loss nor gradient.
    Raises ValueError when the arrays disagree on T."""
    check_rows("logits", logits, token_ids, pair_index, is_chosen, reference_logps, targets)
    s, z = settings, upcast(logits)
    log_z = log_sum_exp(z)  # [T, 1]
    logps = gather_logps(z, log_z, token_ids[:, None])[:, 0]  # [T]
    z_tempered, log_z_tempered = z, log_z
    if s.temperature != 1:
        z_tempered = z / s.temperature
        log_z_tempered = log_sum_exp(z_tempered)
    entries = gather_logps(z_tempered, log_z_tempered, targets.ids)  # [T, K]
    tail = tail_logps(z_tempered, log_z_tempered, targets) if s.estimator == "bucket" else None  # [T]
    kl = token_divergence(entries, tail, targets, is_chosen, s)
    loss, sums = pair_loss(
        logps, kl, pair_index, is_chosen, reference_logps, n_pairs, settings=s, denominators=denominators
    )
    if not loss.requires_grad:  # no term has a weight: a zero that can be differentiated, whatever the logits hold
        loss = loss + z[:, :0].sum()
    return loss, sums


def check_rows(name: str, first: Tensor, *arrays: Tensor | TeacherTargets) -> None:
    """Raise ValueError unless the arrays of `joint_loss` have as many rows as the first, which is called `name`."""
    rows = [len(a.tail_logmass if isinstance(a, TeacherTargets) else a) for a in (first, *arrays)]
    if len(set(rows)) > 1:
        names = f"{name}, token_ids, pair_index, is_chosen, reference_logps and targets"
        raise ValueError(f"{names} have {rows} rows; pass one row per response token in each")


def pair_loss(
    logps: Tensor,
    kl: Tensor,
    pair_index: Tensor,
    is_chosen: Tensor,
    reference_logps: Tensor,
    n_pairs: int,
    *,
    settings: LossSettings,
    denominators: Denominators,
    totals: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`joint_loss` from each token's log-prob and divergence, logps and kl [T]; the loss is in the dtype of logps.

    totals [3, 2B] float64: `side_sums` of all rows of these pairs, when some are not here. The sums over pairs are then
    of whole pairs, those over tokens of the rows that are here."""
    s, kl = settings, kl.double()
    here = side_sums(logps, reference_logps, pair_index, is_chosen, n_pairs)
    if totals is not None:  # the same numbers wherever the rows are, with the derivative of those here
        here = totals + (here - here.detach())
    policy, reference, lengths = here.view(3, n_pairs, 2)
    dpo = sequence_dpo_loss(
        *policy.unbind(1), *reference.unbind(1), variant=s.dpo_variant, beta=s.beta, label_smoothing=s.label_smoothing,
        chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, 1],
    )  # fmt: skip
    margin = dpo.chosen_reward - dpo.rejected_reward  # [B]
    terms = Terms(policy, dpo, margin, kl, is_chosen)
    sums = {metric.name: metric.sum(terms) for metric in SUMMED if metric.sum}
    counts = {"pairs": here.new_full((), n_pairs), "chosen_tokens": lengths[:, 0].sum(),
              "rejected_tokens": lengths[:, 1].sum()}  # fmt: skip
    sums |= counts
    loss = weighted(sums, s, denominators)
    return loss.to(logps.dtype), {name: value.detach() for name, value in sums.items()}


def side_sums(logps: Tensor, reference_logps: Tensor, pair_index: Tensor, is_chosen: Tensor, n_pairs: int) -> Tensor:
    """Sums [3, 2B] over the rows of each side, chosen and rejected of pair 0, of pair 1, ...: log-probs, those of the
    reference, and 1. float64: over 8,000 tokens float32 loses more than a small margin."""
    side = 2 * pair_index + (~is_chosen).long()  # [T]
    per_token = torch.stack([logps.double(), reference_logps.double(), torch.ones_like(logps, dtype=torch.float64)])
    return per_token.new_zeros(3, 2 * n_pairs).index_add(1, side, per_token)


def weighted(sums: dict[str, Tensor], s: LossSettings, denominators: Denominators) -> Tensor:
    """The joint loss of its sums."""
    coefficients = {
        "dpo": s.w_dpo / denominators.pairs, "kl_chosen": s.w_pos / denominators.chosen_tokens,
        "kl_rejected": s.w_neg / denominators.rejected_tokens, "nll": s.nll_coef / denominators.chosen_tokens,
    }  # fmt: skip
    terms = [coefficient * sums[name] for name, coefficient in coefficients.items() if coefficient]
    return sum(terms, sums["dpo"].new_zeros(()))


def share_of_group(sums: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """A rank's share of `sums`, to be added over all ranks, when `size` ranks have the same pairs and each some rows."""
    of_rows = {metric.name for metric in SUMMED if metric.of == "rows"}
    return {name: value if name in of_rows else value / size for name, value in sums.items()}
