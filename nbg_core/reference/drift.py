"""Sampler drift: the difference between the sampler's and the reference's log-probability of the same token, both with
the same weights.

Sampler and trainer use different kernels, so they never agree exactly. When they differ much, training works on
another distribution than the one that was sampled from. Both log-probabilities are of the model's own distribution
(temperature 1, no top-p), so sampling settings do not matter. Only responses that the reference itself drew are
compared, because those of the teacher or of an earlier policy come from other weights.

`step_0_bound` says how far the trainer itself may be from the reference before its first update.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from nbg_core.base.names import find
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import RESPONSES_OF_PAIRS, made_with

BOUND = 0.1
"""Nats per token that count as little drift: about five times what rounding logits to bfloat16 costs."""
MAX_SHARE = 0.01
"""The check `sampler_agrees` warns when a larger share of tokens drifts by more than BOUND."""

STEP_0_NATS = {"fp32": 1e-4, "bf16": 0.1}
"""Training precision -> nats by which a response of one token may differ before the first update (`step_0_bound`)."""


def step_0_bound(precision: str, beta: float, n_tokens: np.ndarray) -> np.ndarray:
    """Largest |implicit reward| that counts as 0 before the first update, for each response of `n_tokens` tokens.

    `n_tokens` has any shape, and the result has the same. Rounding errors of tokens have random signs, so their sum
    grows with the square root of the length. float32 differs only by the order of sums (1.5e-6 nats per token on CPUs,
    more between kernels), bfloat16 by about 0.1 nats per token. Raises ValueError for an unknown precision."""
    return beta * find(STEP_0_NATS, precision, "training.precision") * np.sqrt(n_tokens)


_DRIFTS = f"""
    SELECT r.sample_id, unnest(list_transform(list_zip(s.logprobs, r.token_logprobs), x -> abs(x[1] - x[2]))) AS drift
    FROM reference_logprobs r JOIN samples s ON s.sample_id = r.sample_id AND s.model_id = r.model_id
    WHERE r.model_id = $2 AND r.settings_id = $3 AND len(s.logprobs) = len(r.token_logprobs) AND r.sample_id IN
      (SELECT sample_id FROM {RESPONSES_OF_PAIRS})"""
"""SQL of the drift of each compared token: sample_id, drift (nats). $1 slice, $2 model id of the reference, $3
scoring_id."""


def by_response(lake: Lake, slice_name: str) -> pl.DataFrame:
    """Drift of each compared response in the pairs of a slice, largest first.

    Columns: sample_id; tokens, their number; mean and max, nats per token; past_bound, tokens that drift by more than
    BOUND."""
    return _sql(
        lake,
        "SELECT sample_id, count(*) AS tokens, avg(drift) AS mean, max(drift) AS max, "
        f"count(*) FILTER (drift > {BOUND}) AS past_bound FROM ({_DRIFTS}) GROUP BY sample_id "
        "ORDER BY max DESC, sample_id",
        slice_name,
    )


def summary(lake: Lake, slice_name: str) -> dict[str, Any]:
    """Over all compared tokens of a slice: their number, mean and max drift in nats, and the share past BOUND.

    All but the number are None when nothing was compared."""
    df = by_response(lake, slice_name)
    tokens = int(df["tokens"].sum())
    return {
        "compared_tokens": tokens,
        "sampler_drift_mean": (df["mean"] * df["tokens"]).sum() / tokens if tokens else None,
        "sampler_drift_max": df["max"].max(),
        "sampler_drift_share": df["past_bound"].sum() / tokens if tokens else None,
    }


def histogram(lake: Lake, slice_name: str) -> pl.DataFrame:
    """Compared tokens by drift: log10 (lower edge of a quarter of a decade; the first has all below 1e-8), tokens."""
    return _sql(
        lake,
        f"SELECT floor(4 * log10(greatest(drift, 1e-8))) / 4 AS log10, count(*) AS tokens FROM ({_DRIFTS}) "
        "GROUP BY ALL ORDER BY ALL",
        slice_name,
    )


def _sql(lake: Lake, query: str, slice_name: str) -> pl.DataFrame:
    made = made_with(lake, "reference_logprobs", slice_name)
    return lake.sql(query, [slice_name, made["reference"], made["scoring_id"]])
