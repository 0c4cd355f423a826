"""The divergences between teacher and student that a profile can name (`training.loss.divergence`).

A divergence is an entry of DIVERGENCES. Its functions get log-probabilities of the teacher (p) and the student (q) over
the same outcomes, in nats, and sum over the last dimension. This module does not import torch, because reading a
profile checks names against DIVERGENCES and must not import it.

Shapes: T response tokens, K stored teacher entries of the widest position. The bucket estimator has K + 1 outcomes: the
entries, and all other tokens together (the bucket).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOG_TINY = math.log(2.0**-126)
"""-87.3, the log of the smallest normal float32. Reverse KL and JSD raise smaller log-probabilities, -inf included, to
this value, so that everything stays finite."""


@dataclass(frozen=True)
class Divergence:
    """A divergence between the teacher p and the student q at each position."""

    name: str
    """Value of `training.loss.divergence`."""
    meaning: str
    of_buckets: Callable[[Tensor, Tensor, float], Tensor]
    """Bucket estimator: (log p [T, K + 1], log q [T, K + 1], jsd_alpha) -> divergence [T]."""
    of_samples: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Estimator `sampled_tail`: (weights [T, K], log p [T, K], log q [T, K]) -> unbiased estimate [T] of the
    divergence, for weights whose expectation is p. None if there is no such estimate; the profile then needs
    `estimator: bucket`."""


def forward_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """KL(p || q) [T]; `alpha` is not used."""
    return kl_terms(log_p.exp(), log_p, log_q).sum(-1)


def sampled_forward_kl(weights: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Unbiased estimate [T] of KL(p || q): sum_v weight_v (log p_v - log q_v)."""
    return kl_terms(weights, log_p, log_q).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """KL(q || p) [T]; `alpha` is not used."""
    log_p, log_q = log_p.clamp(min=LOG_TINY), log_q.clamp(min=LOG_TINY)
    return kl_terms(log_q.exp(), log_q, log_p).sum(-1)


def generalised_jsd(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """a KL(p || m) + (1 - a) KL(q || m) [T] with m = a p + (1 - a) q and a = `alpha` (arXiv 2306.13649)."""
    log_p, log_q = log_p.clamp(min=LOG_TINY), log_q.clamp(min=LOG_TINY)
    log_m = (log_p + math.log(alpha)).logaddexp(log_q + math.log1p(-alpha))
    terms = alpha * kl_terms(log_p.exp(), log_p, log_m) + (1 - alpha) * kl_terms(log_q.exp(), log_q, log_m)
    return terms.sum(-1)


def kl_terms(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a - log b), elementwise. Where a is 0 the value is 0 and no gradient is NaN, whatever the logs are."""
    return a * (log_a - log_b).where(a > 0, 0.0)


DIVERGENCES: dict[str, Divergence] = {
    d.name: d
    for d in (
        Divergence("forward", "KL(teacher || student)", forward_kl, sampled_forward_kl),
        Divergence("reverse", "KL(student || teacher)", reverse_kl),
        Divergence("jsd", "generalised Jensen-Shannon divergence; `jsd_alpha` weighs the teacher", generalised_jsd),
    )
}
