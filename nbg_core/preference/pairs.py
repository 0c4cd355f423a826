"""Selects the pairs of scored responses, and says why a query has none.

The combined score of a response is the weighted sum of its scores; a scorer that does not apply to a query (the
verifier of a query without one) adds nothing. The margin of a pair is the difference of the combined scores of chosen
and rejected. Pairs of a query are taken greedily, widest margin first, until no margin of at least `min_margin` is left
or there are `max_pairs_per_query`. No text is used twice.

A query without a pair is a rejection of stage 'pairs', with a reason and the two responses that came nearest to a pair.
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
    """A reason why a query has no pair."""

    meaning: str
    remedy: str
    """What a user can change."""


REASONS: dict[str, Reason] = {
    "unscored": Reason(
        "no scorer with a weight applies: the query has no verifier, and no scorer that needs none has a weight",
        "give the queries a verifier, or give a scorer that needs none, such as teacher_loglik, a weight in "
        "preference.weights",
    ),
    "single_response": Reason(
        "there are fewer than two scored responses", "raise sampling.n_student or sampling.n_teacher"
    ),
    "all_correct": Reason(
        "every response has the verifier score 1, and the other scorers give no wide enough margin",
        "use harder queries, or raise sampling.temperature or sampling.n_student",
    ),
    "all_wrong": Reason(
        "every response has the verifier score 0, and the other scorers give no wide enough margin",
        "use easier queries, take positives from the teacher (sampling.n_teacher), or check the verifier",
    ),
    "identical": Reason(
        "all responses have the same text, or those whose scores are far enough apart do",
        "raise sampling.temperature or sampling.n_student",
    ),
    "truncated_positive": Reason("only truncated responses are good enough to be chosen", "raise sampling.max_tokens"),
    "no_margin": Reason(
        "the widest margin is below preference.min_margin",
        "lower preference.min_margin, or raise sampling.n_student or sampling.temperature",
    ),
}
"""Value of column `reason` in `rejections` of stage 'pairs' -> what it means."""

TOLERANCE = 1e-9
"""A margin may be this much below `min_margin`, so that rounding in the weighted sums decides nothing."""


def select_pairs(scored: pl.DataFrame, settings: PreferenceSettings) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(rows of `pairs`, rows of `rejections`), both without column `slice`, from responses in any order.

    Columns of `scored`: query_id, sample_id, finish_reason, text, and one for each scorer with a weight, null where the
    scorer does not apply."""
    names = [name for name, weight in sorted(settings.weights.items()) if weight]
    weighted = [pl.col(name) * settings.weights[name] for name in names]
    n_scores = pl.sum_horizontal(pl.col(name).is_not_null() for name in names)
    score = pl.when(n_scores > 0).then(pl.sum_horizontal(weighted))
    verdict = pl.col("verifier") if "verifier" in names else pl.lit(None, dtype=pl.Float64)
    combined = scored.select("query_id", "sample_id", "finish_reason", "text", score=score, verdict=verdict)
    pairs, rejections = [], []
    rows = combined.sort("query_id", "sample_id").iter_rows(named=True)
    for _, group in groupby(rows, key=lambda r: r["query_id"]):
        responses = list(group)
        found = _pairs_of(responses, settings)
        pairs += found
        if not found:
            rejections.append(_rejection(responses, settings))
    return _frame("pairs", pairs), _frame("rejections", rejections)


def _pairs_of(responses: list[dict], settings: PreferenceSettings) -> list[dict]:
    """The rows of `pairs` of one query."""
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
    """The (chosen, rejected) with different texts and the widest margin; of equal margins, the smaller sample ids.

    A truncated response can be chosen only with `truncated_positive`. None if there are no two texts."""
    positives = [r for r in responses if truncated_positive or r["finish_reason"] != "length"]
    negatives = sorted(responses, key=lambda r: (r["score"], r["sample_id"]))
    partners = [(p, next((n for n in negatives if n["text"] != p["text"]), None)) for p in positives]
    pairs = [(p, n) for p, n in partners if n]
    return min(pairs, key=lambda pair: (-_margin(*pair), *(r["sample_id"] for r in pair)), default=None)


def _margin(chosen: dict, rejected: dict) -> float:
    return chosen["score"] - rejected["score"]


def _pair(chosen: dict, rejected: dict) -> dict:
    return {
        "pair_id": pair_id(chosen["sample_id"], rejected["sample_id"]), "query_id": chosen["query_id"],
        "chosen_id": chosen["sample_id"], "rejected_id": rejected["sample_id"], "chosen_score": chosen["score"],
        "rejected_score": rejected["score"], "margin": _margin(chosen, rejected),
    }  # fmt: skip


def _rejection(responses: list[dict], settings: PreferenceSettings) -> dict:
    """The row of `rejections` of a query without a pair: the reason, and the two responses that came nearest to one."""
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
