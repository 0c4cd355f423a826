"""Asset `filtered_pairs`, tables `pairs`, `scores` and `rejections`: scored responses, the pairs with a wide margin,
and the reason for each query without a pair."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import polars as pl

from nbg_core.base.ids import content_version
from nbg_core.lake.queries import current_samples
from nbg_core.lake.records import Write
from nbg_core.lineage.run import Report, Run
from nbg_core.preference.pairs import REASONS, select_pairs
from nbg_core.preference.scoring import ASSET, score_samples


class NoPairsError(ValueError):
    """No query of a slice gave a pair. The message names the reasons with their numbers, and what to change."""


@dataclass(frozen=True, kw_only=True)
class PairsReport(Report):
    n_pairs: int
    """Pairs of the slice."""
    new_scores: int
    """Scores that this run computed."""
    n_responses: int
    """Responses that were scored."""
    n_queries: int
    """Queries that they answer."""
    n_queries_with_pairs: int
    """Those of the queries that have a pair."""
    rejected: dict[str, int]
    """Queries without a pair, by reason."""
    mean_margin: float
    mean_scores: dict[str, float | None]
    """Mean score of the responses, by scorer."""
    student_pass_rate: float | None
    """Share of the student's responses that the verifier passed; None without the verifier."""


def materialise(run: Run, slice_name: str) -> PairsReport:
    """Score the current responses of a slice and select its pairs.

    Raises NoPairsError when there is none (the scores are kept), SpecError for a query whose verifier cannot work."""
    preference = run.profile.preference
    snapshot, inputs = run.read_upstream(ASSET, slice_name)
    samples = current_samples(run.lake, slice_name, snapshot)
    scores, new_scores = score_samples(run, slice_name, samples, inputs)
    scored = samples.select("query_id", "sample_id", "source", "finish_reason", "text")
    for scorer, values in scores.items():
        scored = scored.join(values.rename({"score": scorer}), on="sample_id", how="left", maintain_order="left")
    pairs, rejections = select_pairs(scored, preference)
    rejected = dict(sorted(Counter(rejections["reason"].to_list()).items()))
    if pairs.is_empty():
        raise NoPairsError(_no_pairs(slice_name, samples, rejected))
    pairs, rejections = (df.with_columns(slice=pl.lit(slice_name)) for df in (pairs, rejections))
    writes, new_pairs = _writes(run, slice_name, pairs, rejections)
    version = content_version(pairs["pair_id"].to_list())
    commit = run.commit(ASSET, slice_name, writes, inputs=inputs, data_version=version)
    student = scored.filter(pl.col("source") == "student")
    passed = student.select((pl.col("verifier") >= 1).mean()).item() if "verifier" in scores else None
    return PairsReport.of(
        commit, ASSET, slice_name, version, rows=pairs.height, new_rows=new_pairs + new_scores, n_pairs=pairs.height,
        new_scores=new_scores, n_responses=samples.height, n_queries=samples["query_id"].n_unique(),
        n_queries_with_pairs=pairs["query_id"].n_unique(), rejected=rejected, mean_margin=pairs["margin"].mean(),
        mean_scores={k: v["score"].mean() for k, v in scores.items()}, student_pass_rate=passed,
    )  # fmt: skip


def _writes(run: Run, slice_name: str, pairs: pl.DataFrame, rejections: pl.DataFrame) -> tuple[list[Write], int]:
    """The writes of the tables whose rows of this slice differ from those in the lake, and the number of new pairs."""
    writes, new_pairs = [], 0
    for table, rows, where in (
        ("pairs", pairs, "slice = ?"),
        ("rejections", rejections, "slice = ? AND stage = 'pairs'"),
    ):
        old = run.lake.sql(f"SELECT * FROM {table} WHERE {where}", [slice_name]).select(rows.columns)
        if not old.sort(rows.columns).equals(rows.sort(rows.columns)):
            writes.append(Write(table, rows, replace=where, params=(slice_name,)))
        if table == "pairs":
            new_pairs = rows.join(old, on="pair_id", how="anti").height
    return writes, new_pairs


def _no_pairs(slice_name: str, samples: pl.DataFrame, rejected: dict[str, int]) -> str:
    """The error message for a slice without a pair."""
    if samples.is_empty():
        return f"filtered_pairs[{slice_name}]: there are no responses; raise sampling.n_student, then sample again"
    reasons = "; ".join(
        f"{n} {reason}: {REASONS[reason].remedy}" for reason, n in sorted(rejected.items(), key=lambda r: -r[1])
    )
    queries = samples["query_id"].n_unique()
    return f"filtered_pairs[{slice_name}]: none of {queries} queries gave a pair, {samples.height} responses. {reasons}"
