"""The divergence between teacher and student at each response token, from a stored teacher distribution.

Training calls `token_divergence` on log-probabilities that `modeling.lm_head` collects. `sampled_tail_forward_kl` and
`bucket_divergence` compute the same from whole logits; tests and benchmarks call them.

Shapes: T response tokens, V vocabulary, K stored teacher entries of the widest position. Rows of [T, ...] arrays are
already shifted: row t predicts response token t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbg_core.base.names import find, unknown
from nbg_core.losses.divergence import DIVERGENCES, LOG_TINY
from nbg_core.losses.logps import gather_logps, log_sum_exp, upcast
from nbg_core.losses.settings import ESTIMATORS, LossSettings
from nbg_core.losses.targets import TeacherTargets


def sampled_tail_forward_kl(logits: Tensor, targets: TeacherTargets, *, temperature: float = 1.0) -> Tensor:
    """Unbiased estimate [T] of KL(teacher || student) from top entries and tail samples.

    It is sum_v w_v (log p_v - log q_v) over the stored entries v, with p the teacher's probabilities, q the student's
    and weights w = `targets.weights()`. logits [T, V] are already shifted. Computed in float32 (float64 for float64
    logits), neither reduced nor multiplied by temperature^2. The expected gradient with respect to logits / temperature
    is q - p. The estimate of a row may be negative; its expectation is not. A row without tail samples counts its top
    entries alone, which is right when the mass outside them is negligible; else use `bucket_divergence`. Raises
    ValueError for a temperature <= 0.

    Source: random-sampling distillation, arXiv 2503.16870; here the top entries are exact and only the tail is
    sampled."""
    settings = LossSettings(temperature=temperature)
    z = upcast(logits) / temperature  # [T, V]
    return divergence_of(gather_logps(z, log_sum_exp(z), targets.ids), None, targets, settings)


def bucket_divergence(
    logits: Tensor, targets: TeacherTargets, *, kind: str, temperature: float = 1.0, jsd_alpha: float = 0.5
) -> Tensor:
    """Divergence [T] over the top entries and one more outcome, all tokens outside them. Tail samples are not read.

    `kind` is a name in DIVERGENCES; logits [T, V] are already shifted. Computed in float32 (float64 for float64
    logits), neither reduced nor multiplied by temperature^2. The value is a lower bound of the divergence over the
    whole vocabulary, and equal to it when all tokens are top entries. Raises ValueError for an unknown kind, a
    temperature <= 0 or a jsd_alpha outside (0, 1)."""
    settings = LossSettings(divergence=kind, estimator="bucket", temperature=temperature, jsd_alpha=jsd_alpha)
    z = upcast(logits) / temperature  # [T, V]
    log_z = log_sum_exp(z)  # [T, 1]
    return divergence_of(gather_logps(z, log_z, targets.ids), tail_logps(z, log_z, targets), targets, settings)


def divergence_of(entries: Tensor, tail: Tensor | None, targets: TeacherTargets, settings: LossSettings) -> Tensor:
    """The divergence [T] that `settings` name, without the factor temperature^2.

    entries [T, K]: the student's log-probs of targets.ids. tail [T]: log of the student's mass outside the top entries,
    which only the bucket estimator reads. Both are at the temperature of `settings`."""
    divergence = find(DIVERGENCES, settings.divergence, "divergence")
    log_p = targets.logprobs.to(entries.dtype)  # [T, K]
    match settings.estimator:
        case "sampled_tail":
            if divergence.of_samples is None:
                able = [name for name, d in DIVERGENCES.items() if d.of_samples is not None]
                raise unknown("divergence for estimator 'sampled_tail'", settings.divergence, able)
            return divergence.of_samples(targets.weights().to(entries.dtype), log_p, entries)
        case "bucket":
            assert tail is not None  # callers compute it for this estimator
            log_p = torch.where(targets.is_top, log_p, -torch.inf)
            log_p = torch.cat([log_p, targets.tail_logmass[:, None].to(entries.dtype)], -1)  # [T, K + 1]
            log_q = torch.cat([torch.where(targets.is_top, entries, -torch.inf), tail[:, None]], -1)  # [T, K + 1]
            return divergence.of_buckets(log_p, log_q, settings.jsd_alpha)
        case _:
            raise unknown("estimator", settings.estimator, ESTIMATORS)


def tail_logps(z: Tensor, log_z: Tensor, targets: TeacherTargets) -> Tensor:
    """Log [T] of the student's mass outside the top entries, from logits z [T, V] and their log-sum-exp log_z [T, 1].

    It is summed over the tokens outside: 1 - (mass of the top entries) would lose all digits of a small mass."""
    columns = z.shape[-1]
    # Entries that are not top entries are scattered to a column behind the vocabulary, which is cut off.
    ids = torch.where(targets.is_top, targets.ids, columns)  # [T, K]
    in_top = torch.zeros(len(z), columns + 1, dtype=torch.bool, device=z.device)  # [T, V + 1]
    in_top = in_top.scatter_(1, ids, True)[:, :columns]  # [T, V]
    # The fill is finite, because a row of -inf alone would have NaN gradients.
    tail = log_sum_exp(z.masked_fill(in_top, torch.finfo(z.dtype).min)) - log_z  # [T, 1]
    return torch.where(in_top.all(-1), LOG_TINY, tail[:, 0])


def token_divergence(
    entries: Tensor, tail: Tensor | None, targets: TeacherTargets, is_chosen: Tensor, settings: LossSettings
) -> Tensor:
    """`divergence_of` [T], times temperature^2 if the settings say so. Chosen rows with w_pos 0 and rejected rows with
    w_neg 0 have a value but no gradient."""
    if not (settings.w_pos and settings.w_neg):  # by `where`, not by a factor of 0: 0 * NaN is NaN
        trained = torch.where(is_chosen, bool(settings.w_pos), bool(settings.w_neg))  # [T]
        entries = torch.where(trained[:, None], entries, entries.detach())  # [T, K]
        tail = None if tail is None else torch.where(trained, tail, tail.detach())  # [T]
    kl = divergence_of(entries, tail, targets, settings)  # [T]
    return kl * settings.temperature**2 if settings.scale_by_temperature_squared else kl
