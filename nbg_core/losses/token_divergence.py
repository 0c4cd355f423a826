"""The divergence between teacher and student at each response token, from a stored teacher distribution.

Shapes: T response tokens, V vocabulary, K stored teacher entries of the widest position. Row t of [T, ...] arrays is
already shifted: it is the distribution that response token t was drawn from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbg_core.base.names import find
from nbg_core.losses.divergence import DIVERGENCES, LOG_TINY
from nbg_core.losses.logps import gather_logps, log_sum_exp, upcast
from nbg_core.losses.settings import LossSettings
from nbg_core.losses.targets import TeacherTargets


def sampled_tail_forward_kl(logits: Tensor, targets: TeacherTargets, *, temperature: float = 1.0) -> Tensor:
    """Unbiased estimate [T] of KL(teacher || student) from top entries and tail samples.

    sum_v q_v (log p_T(v) - log p_s(v)), q = `targets.weights()`. logits [T, V], already shifted; float32, or float64 if
    given; no reduction, no temperature^2. The expected gradient in logits / temperature is p_s - p_T. One row's estimate
    may be negative; its expectation is not. A row without tail samples counts its top entries alone: right when what is
    outside is negligible, else use `bucket_divergence`. Raises ValueError for a temperature <= 0. Source: random-sampling
    distillation, arXiv 2503.16870, here stratified with exact top entries."""
    s = LossSettings(temperature=temperature)
    z = upcast(logits) / temperature
    return divergence_of(gather_logps(z, log_sum_exp(z), targets.ids), None, targets, s)


def bucket_divergence(
    logits: Tensor, targets: TeacherTargets, *, kind: str, temperature: float = 1.0, jsd_alpha: float = 0.5
) -> Tensor:
    """Divergence [T] over the top entries and one more outcome, everything outside them; tail samples are not read.

    logits [T, V], already shifted; float32, or float64 if given; no reduction, no temperature^2. `kind` is a name in
    DIVERGENCES. Each is a lower bound of the divergence over the whole vocabulary, equal to it when the top entries are
    the whole vocabulary. Raises ValueError for an unknown kind, a temperature <= 0 or a jsd_alpha outside (0, 1)."""
    s = LossSettings(divergence=kind, estimator="bucket", temperature=temperature, jsd_alpha=jsd_alpha)
    z = upcast(logits) / temperature
    log_z = log_sum_exp(z)
    return divergence_of(gather_logps(z, log_z, targets.ids), tail_logps(z, log_z, targets), targets, s)


def divergence_of(entries: Tensor, tail: Tensor | None, targets: TeacherTargets, s: LossSettings) -> Tensor:
    """Divergence [T] of `s`, without temperature^2, from the student's log-probs at the temperature of `s`.

    entries [T, K]: at targets.ids. tail [T]: log of the mass outside the top entries, read by the bucket estimator."""
    divergence = find(DIVERGENCES, s.divergence, "divergence")
    log_p = targets.logprobs.to(entries.dtype)
    match s.estimator:
        case "sampled_tail":
            assert divergence.of_samples is not None  # LossSettings refuses the other divergences
            return divergence.of_samples(targets.weights().to(entries.dtype), log_p, entries)
        case "bucket":
            assert tail is not None  # whoever has this estimator computes it
            log_p = torch.where(targets.is_top, log_p, -torch.inf)
            log_p = torch.cat([log_p, targets.tail_logmass[:, None].to(entries.dtype)], -1)  # [T, K + 1]
            log_q = torch.cat([torch.where(targets.is_top, entries, -torch.inf), tail[:, None]], -1)  # [T, K + 1]
            return divergence.of_buckets(log_p, log_q, s.jsd_alpha)
        case _:
            raise ValueError(f"unknown estimator {s.estimator!r}")


def tail_logps(z: Tensor, log_z: Tensor, targets: TeacherTargets) -> Tensor:
    """The student's log mass [T] outside the top entries: a sum over what is outside, never 1 - sum.

    From logits z [T, V] and their log-sum-exp log_z [T, 1]."""
    columns = z.shape[-1]
    ids = torch.where(targets.is_top, targets.ids, columns)  # what is no top entry goes to a column that is cut off
    in_top = torch.zeros(len(z), columns + 1, dtype=torch.bool, device=z.device)
    in_top = in_top.scatter_(1, ids, True)[:, :columns]  # [T, V]
    # The fill is finite: -inf rows give NaN gradients.
    tail = log_sum_exp(z.masked_fill(in_top, torch.finfo(z.dtype).min)) - log_z  # [T, 1]
    return torch.where(in_top.all(-1), LOG_TINY, tail[:, 0])


def token_divergence(
    entries: Tensor, tail: Tensor | None, targets: TeacherTargets, is_chosen: Tensor, s: LossSettings
) -> Tensor:
    """`divergence_of` [T], temperature^2 included. A row of a side with weight 0 has a value and no gradient."""
    if not (s.w_pos and s.w_neg):  # by `where`, not by a factor 0: 0 * NaN is NaN
        trained = torch.where(is_chosen, bool(s.w_pos), bool(s.w_neg))  # [T]
        entries = torch.where(trained[:, None], entries, entries.detach())
        tail = None if tail is None else torch.where(trained, tail, tail.detach())
    kl = divergence_of(entries, tail, targets, s)
    return kl * s.temperature**2 if s.scale_by_temperature_squared else kl
