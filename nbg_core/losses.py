"""The joint loss of Dual Preference Distillation: L = w_dpo * L_DPO + w_pos * L_pos + w_neg * L_neg.

Pure functions from logits to losses. L_DPO compares whole responses (sums over tokens, mean over pairs); L_pos and
L_neg are the divergence between teacher and student at each token of the chosen and of the rejected response (mean
over tokens, each side its own count). Means are over the global batch: `joint_loss` divides by counts of the whole
optimizer step, so contributions of micro-batches and ranks add up to the loss of one big batch.

Choices that the published method leaves open: forward KL(teacher || student), beta 0.1, temperature 1. `ipo` compares
sums over the response, as published (TRL averages over tokens there); `sigmoid_norm` is the length-normalised form.

Shapes: T response tokens of a micro-batch behind one another, V vocabulary, K stored teacher entries of the widest
position, B pairs. Every [T, ...] array is already shifted: row t of the logits predicts token_ids[t], prompt and
padding rows are not there. Half-precision logits are computed in float32; float64 stays float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from nbg_core.config import LossConfig

LOG_TINY = math.log(torch.finfo(torch.float32).tiny)  # -87.3
"""Reverse KL and JSD take log-probabilities below this, a mass of exactly 0 included, to be this: finite everywhere."""


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's distribution at T response positions, already shifted: an exact head and samples of the rest."""

    ids: Tensor
    """[T, K] int64. Head ids are distinct in a row; a tail id that was drawn twice is there twice and its weights add.
    Padding holds any valid id."""
    logprobs: Tensor
    """[T, K] float32: teacher log p at `ids`, in nats, at the temperature it was stored at. -inf is a probability of 0;
    padding holds anything."""
    is_head: Tensor
    """[T, K] bool: entries that are kept exactly."""
    is_tail: Tensor
    """[T, K] bool: systematic samples of what is outside the head."""
    tail_logmass: Tensor
    """[T] float32: exact log of the teacher's mass outside the head; -inf when there is none."""

    def weights(self) -> Tensor:
        """q [T, K] in the dtype of `logprobs`: p for the head, an equal share of the tail mass for each tail sample.

        A row sums to 1, or to the head's mass when it has no tail samples."""
        n_tail = self.is_tail.sum(-1, keepdim=True).clamp(min=1)  # [T, 1]
        tail = (self.tail_logmass[:, None].exp() / n_tail).expand_as(self.logprobs)
        q = torch.where(self.is_head, self.logprobs.exp(), torch.zeros_like(self.logprobs))
        return torch.where(self.is_tail, tail, q)

    def take(self, rows: slice) -> TeacherTargets:
        """The targets of some rows; views, nothing is copied."""
        return TeacherTargets(**{name: tensor[rows] for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class DpoTerms:
    """What `sequence_dpo_loss` returns for B pairs; nothing is reduced over pairs."""

    loss: Tensor
    """[B], differentiable."""
    chosen_reward: Tensor
    """[B], detached: beta * (log p_policy - log p_reference) of the chosen; per token under `sigmoid_norm`."""
    rejected_reward: Tensor
    """[B], detached: the same of the rejected."""


class LossSettings(LossConfig):
    """Knobs of the joint loss: those of a profile (`training.loss`), and the temperature that the teacher's rows have.

    Raises ValueError (pydantic's ValidationError), naming knob and value, for values that make no sense."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the divergence, the one the teacher was stored at; DPO and NLL are always at 1."""


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


def token_logps(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log p(token_ids) [T] under logits [T, V] (already shifted), at temperature 1; float32, or float64 if given.

    No reduction. Of whole logits; training and scoring have the same numbers from `head`, without them."""
    z = _upcast(logits)
    return _gather_logps(z, _log_z(z), token_ids[:, None])[:, 0]


def sampled_tail_forward_kl(logits: Tensor, targets: TeacherTargets, *, temperature: float = 1.0) -> Tensor:
    """Unbiased estimate [T] of KL(teacher || student) from head and tail samples: sum_v q_v (log p_T(v) - log p_s(v)).

    logits [T, V], already shifted; float32, or float64 if given; no reduction, no temperature^2. The expected gradient
    in logits / temperature is p_s - p_T. One row's estimate may be negative, its expectation is not. A row without tail
    samples counts its head alone: right when what is outside is negligible, else use `bucket_divergence`.
    Raises ValueError for a temperature <= 0. Source: random-sampling distillation, arXiv 2503.16870, here stratified
    with an exact head."""
    _check_divergence("forward", temperature, 0.5)
    z = _upcast(logits) / temperature
    return _sampled_tail(_gather_logps(z, _log_z(z), targets.ids), targets)


def bucket_divergence(
    logits: Tensor, targets: TeacherTargets, *, kind: str, temperature: float = 1.0, jsd_alpha: float = 0.5
) -> Tensor:
    """Divergence [T] over |head| + 1 outcomes, the last being every token outside the head; tail samples are not read.

    logits [T, V], already shifted; float32, or float64 if given; no reduction, no temperature^2. `kind`: forward
    KL(p || q), reverse KL(q || p), or jsd = a KL(p || m) + (1 - a) KL(q || m) with m = a p + (1 - a) q (p teacher,
    q student, a = jsd_alpha; arXiv 2306.13649). Each is a lower bound of the divergence over the whole vocabulary,
    equal to it when the head is the whole vocabulary. A teacher mass of exactly 0 is LOG_TINY in reverse and jsd.
    Raises ValueError for an unknown kind, a temperature <= 0 or a jsd_alpha outside (0, 1)."""
    _check_divergence(kind, temperature, jsd_alpha)
    z = _upcast(logits) / temperature
    log_z = _log_z(z)
    return _bucket(_gather_logps(z, log_z, targets.ids), _tail_logps(z, log_z, targets), targets, kind, jsd_alpha)


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
    """DPO loss [B] per pair from log-probabilities [B] summed (not averaged) over the response; no reduction.

    float32, or float64 if given. With reward r = beta (log p_policy - log p_reference) and margin d = r+ - r-:
    sigmoid -log sigmoid(d) (arXiv 2305.18290), with label smoothing e: -(1 - e) log sigmoid(d) - e log sigmoid(-d)
    (cDPO); sigmoid_norm the same with each reward divided by its length [B] in tokens; ipo (d / beta - 1 / (2 beta))^2
    (arXiv 2310.12036); hinge max(0, 1 - d) (arXiv 2305.10425).
    Raises ValueError for an unknown variant, beta <= 0, label smoothing outside [0, 0.5) or with ipo or hinge, and
    sigmoid_norm without lengths."""
    _check_dpo(variant, beta, label_smoothing)
    chosen = beta * (_upcast(policy_chosen) - _upcast(reference_chosen))
    rejected = beta * (_upcast(policy_rejected) - _upcast(reference_rejected))
    if variant == "sigmoid_norm":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("variant='sigmoid_norm' needs chosen_lengths and rejected_lengths: pass both, in tokens")
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    margin = chosen - rejected
    if variant == "ipo":
        loss = ((margin - 0.5) / beta).square()
    elif variant == "hinge":
        loss = (1 - margin).relu()
    else:
        loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return DpoTerms(loss, chosen.detach(), rejected.detach())


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
    s, z = settings, _upcast(logits)
    log_z = _log_z(z)  # [T, 1]
    logps = _gather_logps(z, log_z, token_ids[:, None])[:, 0]  # [T]
    hot, log_hot = z, log_z
    if s.temperature != 1:
        hot = z / s.temperature
        log_hot = _log_z(hot)
    entries = _gather_logps(hot, log_hot, targets.ids)  # [T, K]
    tail = _tail_logps(hot, log_hot, targets) if s.estimator == "bucket" else None  # [T]
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


def token_divergence(
    entries: Tensor, tail: Tensor | None, targets: TeacherTargets, is_chosen: Tensor, s: LossSettings
) -> Tensor:
    """Divergence [T] of `s`, temperature^2 included, from the student's log-probs at the temperature of `s`.

    entries [T, K]: at targets.ids. tail [T]: log of the mass outside the head, read by the bucket estimator only. A row
    of a side with weight 0 has a value and no gradient."""
    if not (s.w_pos and s.w_neg):  # by `where`, not by a factor 0: 0 * NaN is NaN
        trained = torch.where(is_chosen, bool(s.w_pos), bool(s.w_neg))  # [T]
        entries = torch.where(trained[:, None], entries, entries.detach())
        tail = None if tail is None else torch.where(trained, tail, tail.detach())
    if s.estimator == "sampled_tail":
        kl = _sampled_tail(entries, targets)
    else:
        kl = _bucket(entries, tail, targets, s.divergence, s.jsd_alpha)
    return kl * s.temperature**2 if s.scale_by_temperature_squared else kl


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
    sums = {
        "dpo": dpo.loss.sum(), "kl_chosen": torch.where(is_chosen, kl, 0.0).sum(),
        "kl_rejected": torch.where(is_chosen, 0.0, kl).sum(),
        "nll": -policy[:, 0].sum(), "margin": margin.sum(),
        "accuracy": ((margin > 0).double() + 0.5 * (margin == 0).double()).sum(),
        "chosen_reward": dpo.chosen_reward.sum(), "rejected_reward": dpo.rejected_reward.sum(),
        "chosen_logp": policy[:, 0].sum(), "rejected_logp": policy[:, 1].sum(), "pairs": here.new_full((), n_pairs),
        "chosen_tokens": lengths[:, 0].sum(), "rejected_tokens": lengths[:, 1].sum(),
    }  # fmt: skip
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


def _sampled_tail(entries: Tensor, targets: TeacherTargets) -> Tensor:
    q = targets.weights().to(entries.dtype)  # [T, K]
    return _kl_terms(q, targets.logprobs.to(entries.dtype), entries).sum(-1)


def _tail_logps(z: Tensor, log_z: Tensor, targets: TeacherTargets) -> Tensor:
    """The student's log mass [T] outside the head: a sum over what is outside, never 1 - sum."""
    columns = z.shape[-1]
    ids = torch.where(targets.is_head, targets.ids, columns)  # what is not head goes to a column that is cut off
    in_head = torch.zeros(len(z), columns + 1, dtype=torch.bool, device=z.device)
    in_head = in_head.scatter_(1, ids, True)[:, :columns]  # [T, V]
    # The fill is finite: -inf rows give NaN gradients.
    tail = _log_z(z.masked_fill(in_head, torch.finfo(z.dtype).min)) - log_z  # [T, 1]
    return torch.where(in_head.all(-1), LOG_TINY, tail[:, 0])


def _bucket(entries: Tensor, tail: Tensor, targets: TeacherTargets, kind: str, alpha: float) -> Tensor:
    head = torch.where(targets.is_head, entries, -torch.inf)
    log_p = torch.where(targets.is_head, targets.logprobs.to(entries.dtype), -torch.inf)
    log_p = torch.cat([log_p, targets.tail_logmass[:, None].to(entries.dtype)], -1)  # [T, K + 1]
    log_q = torch.cat([head, tail[:, None]], -1)
    if kind == "forward":
        return _kl_terms(log_p.exp(), log_p, log_q).sum(-1)
    log_p, log_q = log_p.clamp(min=LOG_TINY), log_q.clamp(min=LOG_TINY)
    if kind == "reverse":
        return _kl_terms(log_q.exp(), log_q, log_p).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))
    terms = alpha * _kl_terms(log_p.exp(), log_p, log_m) + (1 - alpha) * _kl_terms(log_q.exp(), log_q, log_m)
    return terms.sum(-1)


def _kl_terms(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a - log b), and 0 where a is 0, whatever the logs are there; no NaN in the gradient either."""
    return a * torch.where(a > 0, log_a - log_b, 0.0)


def _gather_logps(z: Tensor, log_z: Tensor, ids: Tensor) -> Tensor:
    return z.gather(-1, ids) - log_z


def _log_z(z: Tensor) -> Tensor:
    return z.logsumexp(-1, keepdim=True)


def _upcast(x: Tensor) -> Tensor:  # rounding logits to bf16 costs 0.02 nats a token: never compute in it
    return x if x.dtype == torch.float64 else x.float()


def _check_dpo(variant: str, beta: float, label_smoothing: float) -> None:
    LossSettings(dpo_variant=variant, beta=beta, label_smoothing=label_smoothing)


def _check_divergence(kind: str, temperature: float, jsd_alpha: float) -> None:
    LossSettings(divergence=kind, estimator="bucket", temperature=temperature, jsd_alpha=jsd_alpha)
