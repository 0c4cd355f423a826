"""Which pairs of scored responses are kept, and why a query has none.

The combined score of a response is the weighted sum of its scores. Pairs of a query are taken greedily, widest margin
first, until none of `min_margin` is left or there are `max_pairs_per_query`. No response, and no second copy of its
text, is used twice. A scorer that does not apply to a query (no verifier) takes no part in its scores.

A query without a pair is a rejection of stage 'pairs', with the two candidates that came nearest and a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import polars as pl

from nbg_core.base.ids import pair_id
from nbg_core.config.profile import PreferenceSettings
from nbg_core.lake import tables


@dataclass(frozen=True)
class Reason:
    """Why a query has no pair, and what to change."""

    meaning: str
    remedy: str


REASONS: dict[str, Reason] = {
    "unscored": Reason(
        "no scorer with a weight applies: the query has no verifier, and teacher_loglik has weight 0",
        "give the queries a verifier, or teacher_loglik a weight in preference.weights",
    ),
    "single_response": Reason("there are not two scored responses", "raise sampling.n_student or n_teacher"),
    "all_correct": Reason(
        "every verifier score is at its upper end",
        "use harder queries, or raise sampling.temperature or n_student",
    ),
    "all_wrong": Reason(
        "every verifier score is at its lower end",
        "use easier queries, take positives from the teacher (sampling.n_teacher), or check the verifier",
    ),
    "identical": Reason(
        "all responses, or those far enough apart, have the same text", "raise sampling.temperature or n_student"
    ),
    "truncated_positive": Reason(
        "only truncated responses (finish reason `length`) are good enough to be positives",
        "raise sampling.max_tokens",
    ),
    "no_margin": Reason(
        "the widest margin is below min_margin",
        "lower preference.min_margin, or raise sampling.n_student or temperature",
    ),
}
"""Codes in column `reason` of `rejections` of stage 'pairs'."""

TOLERANCE = 1e-9
"""Rounding in the weighted sums that does not cost a pair its margin."""


def select_pairs(scored: pl.DataFrame, settings: PreferenceSettings) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs and rejections, without `slice`, of responses in any order.

    `scored` has query_id, sample_id, finish_reason, text, and a column per scorer with a weight (null: unscored)."""
    names = [name for name, weight in sorted(settings.weights.items()) if weight]
    weighted = [pl.col(name) * settings.weights[name] for name in names]
    n_scores = pl.sum_horizontal(pl.col(name).is_not_null() for name in names)
    score = pl.when(n_scores > 0).then(pl.sum_horizontal(weighted))
    columns = scored.with_columns(
        score=score, verdict=pl.col("verifier") if "verifier" in names else pl.lit(None, dtype=pl.Float64)
    )
    pairs, rejections = [], []
    columns = columns.select("query_id", "sample_id", "finish_reason", "text", "score", "verdict")
    rows = columns.sort("query_id", "sample_id").iter_rows(named=True)
    for _, group in groupby(rows, key=lambda r: r["query_id"]):
        responses = list(group)
        found = _pairs_of(responses, settings)
        pairs += found
        if not found:
            rejections.append(_rejection(responses, settings))
    return _frame("pairs", pairs), _frame("rejections", rejections)


def _pairs_of(responses: list[dict], settings: PreferenceSettings) -> list[dict]:
    scored = [r for r in responses if r["score"] is not None]
    used: set[str] = set()
    found: list[dict] = []
    while len(found) < settings.max_pairs_per_query:
        free = [r for r in scored if r["text"] not in used]
        pair = _widest(free, truncated_positive=settings.truncated_positive)
        if not pair or _margin(*pair) < settings.min_margin - TOLERANCE:
            break
        used |= {r["text"] for r in pair}
        found.append(_pair(*pair))
    return found


def _widest(responses: list[dict], *, truncated_positive: bool) -> tuple[dict, dict] | None:
    """The (positive, negative) of different text and the widest margin; ties go to the smaller sample ids."""
    positives = [r for r in responses if truncated_positive or r["finish_reason"] != "length"]
    negatives = sorted(responses, key=lambda r: (r["score"], r["sample_id"]))
    partners = [(p, next((n for n in negatives if n["text"] != p["text"]), None)) for p in positives]
    pairs = [(p, n) for p, n in partners if n]
    return min(pairs, key=lambda pair: (-_margin(*pair), *(r["sample_id"] for r in pair)), default=None)


def _margin(positive: dict, negative: dict) -> float:
    return positive["score"] - negative["score"]


def _pair(chosen: dict, rejected: dict) -> dict:
    return {
        "pair_id": pair_id(chosen["sample_id"], rejected["sample_id"]), "query_id": chosen["query_id"],
        "chosen_id": chosen["sample_id"], "rejected_id": rejected["sample_id"], "chosen_score": chosen["score"],
        "rejected_score": rejected["score"], "margin": _margin(chosen, rejected),
    }  # fmt: skip


def _rejection(responses: list[dict], settings: PreferenceSettings) -> dict:
    """Why a query has no pair, and the two responses that came nearest."""
    scored = [r for r in responses if r["score"] is not None]
    nearest = _widest(scored, truncated_positive=settings.truncated_positive)
    if_truncated = _widest(scored, truncated_positive=True)
    verdicts = {r["verdict"] for r in scored if r["verdict"] is not None}
    by_score = sorted(r["score"] for r in scored)
    wide = settings.min_margin - TOLERANCE
    if not scored:
        reason, detail = "unscored", f"{len(responses)} responses, no score"
    elif len(scored) == 1:
        reason, detail = "single_response", f"1 scored response of {len(responses)}, score {by_score[0]:.4g}"
    elif verdicts and (min(verdicts) >= 1 or max(verdicts) <= 0):
        reason = "all_correct" if min(verdicts) >= 1 else "all_wrong"
        detail = f"verifier score {verdicts.pop():g} of all {len(scored)} responses"
    elif not if_truncated:
        reason, detail = "identical", f"{len(scored)} responses, one text: {scored[0]['text'][:80]!r}"
    elif _margin(*if_truncated) >= wide:
        reason, nearest = "truncated_positive", if_truncated
        detail = f"margin {_margin(*nearest):.4g}, but the positive is truncated"
    elif by_score[-1] - by_score[0] >= wide:
        reason, detail = "identical", f"margin {by_score[-1] - by_score[0]:.4g} only between responses of one text"
    else:
        reason, detail = "no_margin", f"widest margin {_margin(*if_truncated):.4g}, min_margin {settings.min_margin:g}"
    if nearest:
        detail += f"; scores {nearest[0]['score']:.4g} and {nearest[1]['score']:.4g}"
    return {
        "stage": "pairs", "query_id": responses[0]["query_id"],
        "chosen_id": nearest[0]["sample_id"] if nearest else None,
        "rejected_id": nearest[1]["sample_id"] if nearest else None, "reason": reason, "detail": detail,
    }  # fmt: skip


def _frame(table: str, rows: list[dict]) -> pl.DataFrame:
    schema = {k: v for k, v in tables.polars_schema(table).items() if k not in ("slice", "materialisation_id")}
    return pl.DataFrame(rows, schema=schema, orient="row")
