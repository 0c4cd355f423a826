"""The joint loss of Dual Preference Distillation: L = w_dpo L_DPO + w_pos L_pos + w_neg L_neg + nll_coef L_NLL.

L_DPO compares whole responses: log-probabilities are summed over tokens, the loss is the mean over pairs. L_pos and
L_neg are the divergence between teacher and student at each token of the chosen and of the rejected responses, each a
mean over its tokens. L_NLL is the chosen responses' negative log-likelihood per token. Means are over the global batch:
the loss divides by counts of the whole optimizer step, so the shares of micro-batches and ranks add up to the loss of
one big batch.

`joint_loss`, from whole logits, is the definition; tests and benchmarks call it. Training calls
`modeling.lm_head.lm_head_joint_loss`, which computes the same from hidden states and never holds all logits. Both end
in `pair_loss`.

Choices that the published method leaves open: forward KL(teacher || student), beta 0.1, temperature 1.

Shapes: T response tokens of a micro-batch, all responses concatenated; V vocabulary; K stored teacher entries of the
widest position; B pairs. Every [T, ...] array is already shifted: row t of the logits predicts token_ids[t], and there
are no rows for the prompt or for padding. Losses are computed in float32, or in float64 for float64 logits.
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
                raise ValueError(
                    f"{name}={value} must be above 0; count the whole optimizer step, all ranks and micro-batches of it"
                )


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
    """This micro-batch's share of the joint loss, and the sums that the step's metrics are made of.

    logits [T, V], token_ids [T] int64, pair_index [T] int64 in [0, n_pairs), is_chosen [T] bool, reference_logps [T]
    float (of token_ids, at temperature 1), targets of T rows; all already shifted, rows in any order. All rows of a
    pair must be in one micro-batch.

    The loss is a scalar, float32 or, if the logits are, float64. Over all micro-batches and ranks the shares add up to
    w_dpo * sum(dpo) / pairs + w_pos * sum(kl of chosen) / chosen_tokens + w_neg * sum(kl of rejected) / rejected_tokens
    + nll_coef * sum(nll of chosen) / chosen_tokens. Without rows it is 0 and can still be differentiated.

    The sums are detached float64 scalars, to be added over micro-batches and ranks and then divided by a count: dpo,
    margin, accuracy (a tie is half), chosen_reward, rejected_reward, chosen_logp and rejected_logp (of whole responses)
    by pairs; kl_chosen and nll by chosen_tokens; kl_rejected by rejected_tokens. The three counts are among the sums.
    KL sums include temperature^2 if the loss does. Terms of weight 0 are summed, but not part of loss and gradient.
    Raises ValueError when the arrays disagree on T."""
    check_rows("logits", logits, token_ids, pair_index, is_chosen, reference_logps, targets)
    z = upcast(logits)  # [T, V]
    log_z = log_sum_exp(z)  # [T, 1]
    logps = gather_logps(z, log_z, token_ids[:, None])[:, 0]  # [T]
    z_at_temperature, log_z_at_temperature = z, log_z
    if settings.temperature != 1:
        z_at_temperature = z / settings.temperature
        log_z_at_temperature = log_sum_exp(z_at_temperature)
    entries = gather_logps(z_at_temperature, log_z_at_temperature, targets.ids)  # [T, K]
    tail = tail_logps(z_at_temperature, log_z_at_temperature, targets) if settings.estimator == "bucket" else None
    kl = token_divergence(entries, tail, targets, is_chosen, settings)  # [T]
    loss, sums = pair_loss(
        logps, kl, pair_index, is_chosen, reference_logps, n_pairs, settings=settings, denominators=denominators
    )
    if not loss.requires_grad:  # all weights are 0, but the caller differentiates: a 0 that depends on the logits
        loss = loss + z[:, :0].sum()
    return loss, sums


def check_rows(name: str, first: Tensor, *arrays: Tensor | TeacherTargets) -> None:
    """Raise ValueError unless all arrays of `joint_loss` have the same number of rows. `name` names the first one."""
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
    """`joint_loss` from the log-probability logps [T] and divergence kl [T] of each token; the loss has the dtype of
    logps.

    With sequence parallelism a rank has only some rows of its pairs. It then passes totals [3, 2B] float64, the
    `side_sums` over all rows of these pairs on all ranks. Sums over pairs are then of whole pairs, while sums over
    tokens are of this rank's rows."""
    s, kl = settings, kl.double()
    sides = side_sums(logps, reference_logps, pair_index, is_chosen, n_pairs)  # [3, 2B]
    if totals is not None:  # the value is that of all ranks' rows; the gradient flows to this rank's rows
        sides = totals + (sides - sides.detach())
    policy, reference, lengths = sides.view(3, n_pairs, 2)  # [B, 2] each: chosen, rejected
    dpo = sequence_dpo_loss(
        *policy.unbind(1), *reference.unbind(1), variant=s.dpo_variant, beta=s.beta, label_smoothing=s.label_smoothing,
        chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, 1],
    )  # fmt: skip
    margin = dpo.chosen_reward - dpo.rejected_reward  # [B]
    terms = Terms(policy, dpo, margin, kl, is_chosen)
    sums = {metric.name: metric.sum(terms) for metric in SUMMED if metric.sum}
    sums |= {"pairs": sides.new_full((), n_pairs), "chosen_tokens": lengths[:, 0].sum(),
             "rejected_tokens": lengths[:, 1].sum()}  # fmt: skip
    loss = weighted(sums, s, denominators)
    return loss.to(logps.dtype), {name: value.detach() for name, value in sums.items()}


def side_sums(logps: Tensor, reference_logps: Tensor, pair_index: Tensor, is_chosen: Tensor, n_pairs: int) -> Tensor:
    """Sums [3, 2B] over the tokens of each response, in the order chosen and rejected of pair 0, of pair 1, ...

    The three are the policy's log-probabilities, the reference's, and the number of tokens. float64, because float32
    rounds a sum over 8,000 tokens by more than a small margin."""
    side = 2 * pair_index + (~is_chosen).long()  # [T]
    per_token = torch.stack([logps.double(), reference_logps.double(), torch.ones_like(logps, dtype=torch.float64)])
    return per_token.new_zeros(3, 2 * n_pairs).index_add(1, side, per_token)


def weighted(sums: dict[str, Tensor], settings: LossSettings, denominators: Denominators) -> Tensor:
    """The joint loss, a float64 scalar: the sum of its terms, each times its weight and divided by its count."""
    s = settings
    coefficients = {
        "dpo": s.w_dpo / denominators.pairs, "kl_chosen": s.w_pos / denominators.chosen_tokens,
        "kl_rejected": s.w_neg / denominators.rejected_tokens, "nll": s.nll_coef / denominators.chosen_tokens,
    }  # fmt: skip
    terms = [coefficient * sums[name] for name, coefficient in coefficients.items() if coefficient]
    return sum(terms, sums["dpo"].new_zeros(()))


def share_of_group(sums: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """A rank's share of `sums`, to be added over all ranks, in a sequence-parallel group of `size` ranks.

    Sums over whole pairs are the same on all ranks of the group, so a rank's share is 1 / size. Sums over rows are of
    the rank's own rows, and are its share as they are."""
    of_rows = {metric.name for metric in SUMMED if metric.of == "rows"}
    return {name: value if name in of_rows else value / size for name, value in sums.items()}
