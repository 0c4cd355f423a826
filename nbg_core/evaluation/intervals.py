"""Statistics of two models' answers to the same n queries: intervals and an exact test.

`fixed` is the number of queries that the first model got wrong and the second right, `broken` the reverse. All of these
hold at small n too. With n = 1, a normal approximation would call a single fixed query significant.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Z = 1.959964
"""Two-sided 95% quantile of the normal distribution."""


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% score interval of the proportion successes / n (Wilson 1927); (0, 1) if n is 0."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(fixed: int, broken: int, n: int) -> tuple[float, float]:
    """95% score interval of the paired difference (fixed - broken) / n (Tango 1998); (-1, 1) if n is 0."""
    if n == 0:
        return -1.0, 1.0

    def score(difference: float) -> float:
        """How many standard errors the observed difference is above `difference`, if that is the true one. It falls as
        `difference` rises."""
        b = (2 * n - fixed + broken) * difference - fixed - broken
        c = -broken * difference * (1 - difference)
        # The maximum-likelihood estimate of the share of broken queries, given this difference:
        p_broken = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * p_broken + difference * (1 - difference))
        distance = fixed - broken - n * difference
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    mean = (fixed - broken) / n
    low = -1.0 if score(-1.0) <= Z else _root(lambda d: score(d) - Z, -1.0, mean)
    high = 1.0 if score(1.0) >= -Z else _root(lambda d: score(d) + Z, mean, 1.0)
    return low, high


def mcnemar_p_value(fixed: int, broken: int) -> float:
    """Two-sided exact p-value of the hypothesis that neither model is better (McNemar 1947, binomial)."""
    n, fewer = fixed + broken, min(fixed, broken)
    tail = ways = 1  # ways to get at most k heads, and exactly k, in n tosses
    for k in range(fewer):  # not math.comb: thousands of them take minutes
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a decreasing function is 0 between `low` and `high`, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
