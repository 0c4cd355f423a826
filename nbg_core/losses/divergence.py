"""The divergences between teacher and student that a profile can name (`training.loss.divergence`).

A divergence is a row of DIVERGENCES. Its functions get log-probabilities of the teacher and of the student over the
same outcomes and sum over the last dimension. They use tensor methods only: the names are checked when a profile is
read, which must not import torch.

Shapes: T response tokens, K stored entries, K + 1 outcomes: the top entries, and everything else as one (the bucket).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOG_TINY = math.log(2.0**-126)
"""-87.3, log of the smallest normal float32. Reverse KL and JSD take smaller log-probabilities, a mass of exactly 0
included, to be this: everything stays finite."""


@dataclass(frozen=True)
class Divergence:
    """A divergence between the teacher p and the student q at one position."""

    name: str
    meaning: str
    of_buckets: Callable[[Tensor, Tensor, float], Tensor]
    """(log p, log q, jsd_alpha) -> [T], from log-probs [T, K + 1] of all outcomes."""
    of_samples: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(weights, log p, log q) -> [T], from [T, K] at stored entries whose weights are an unbiased sample of p. None: the
    divergence has no such estimate and needs `estimator: bucket`."""


def forward_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """KL(p || q) [T]."""
    return kl_terms(log_p.exp(), log_p, log_q).sum(-1)


def sampled_forward_kl(weights: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Unbiased estimate [T] of KL(p || q): sum_v weight_v (log p_v - log q_v)."""
    return kl_terms(weights, log_p, log_q).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """KL(q || p) [T]."""
    log_p, log_q = log_p.clamp(min=LOG_TINY), log_q.clamp(min=LOG_TINY)
    return kl_terms(log_q.exp(), log_q, log_p).sum(-1)


def generalised_jsd(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """a KL(p || m) + (1 - a) KL(q || m) [T] with m = a p + (1 - a) q and a = `alpha` (arXiv 2306.13649)."""
    log_p, log_q = log_p.clamp(min=LOG_TINY), log_q.clamp(min=LOG_TINY)
    log_m = (log_p + math.log(alpha)).logaddexp(log_q + math.log1p(-alpha))
    terms = alpha * kl_terms(log_p.exp(), log_p, log_m) + (1 - alpha) * kl_terms(log_q.exp(), log_q, log_m)
    return terms.sum(-1)


def kl_terms(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a - log b), and 0 where a is 0, whatever the logs are there; no NaN in the gradient either."""
    return a * (log_a - log_b).where(a > 0, 0.0)


DIVERGENCES: dict[str, Divergence] = {
    d.name: d
    for d in (
        Divergence("forward", "KL(teacher || student)", forward_kl, sampled_forward_kl),
        Divergence("reverse", "KL(student || teacher)", reverse_kl),
        Divergence("jsd", "generalised Jensen-Shannon divergence, `jsd_alpha` of it the teacher", generalised_jsd),
    )
}
