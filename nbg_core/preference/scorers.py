"""Scores of responses, one row per response and scorer, kept in the lake: a response is scored once.

| scorer | score | scorer_id: hash of |
|---|---|---|
| verifier | in [0, 1], see verifiers.py; none for a query without a verifier | verifier, answer, arguments |
| teacher_loglik | mean teacher log-probability of the response's tokens, nats | the teacher, its dtype, vLLM if used |

A scorer of weight 0 does not run. To add one: a weight in PreferenceSettings, a branch in `scorer_ids` and `_compute`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import polars as pl

from nbg_core.ids import digest, model_id
from nbg_core.lake import Input, Write
from nbg_core.preference import verifiers
from nbg_core.run import Run

ASSET = "filtered_pairs"
CHUNK = 2048
"""Responses verified per commit: what a crash can lose."""


def score_samples(
    run: Run, slice: str, samples: pl.DataFrame, inputs: Sequence[Input]
) -> tuple[dict[str, pl.DataFrame], int]:
    """Score what is not scored yet and return, per scorer with a weight, (sample_id, score); and the new rows' number.

    `samples` as from `current_samples`. Raises SpecError naming the query whose verifier cannot work,
    ValueError when the teacher has another tokenizer than the student."""
    scores, new_rows = {}, 0
    for scorer in [name for name, weight in sorted(run.profile.preference.weights.items()) if weight]:
        wanted = samples.join(scorer_ids(run, scorer, samples), on="sample_id", maintain_order="left")
        done = _scored(run, scorer, wanted)
        missing = wanted.join(done, on=["sample_id", "scorer_id"], how="anti", maintain_order="left")
        run.log(f"{ASSET}[{slice}]: {scorer}: {wanted.height - missing.height} of {wanted.height} already scored")
        for rows in _compute(run, slice, scorer, missing):
            frame = rows.with_columns(slice=pl.lit(slice), scorer=pl.lit(scorer))
            new_rows += run.commit(ASSET, slice, [Write("scores", frame)], inputs=inputs).n_rows
        scores[scorer] = _scored(run, scorer, wanted).select("sample_id", "score").sort("sample_id")
    return scores, new_rows


def scorer_ids(run: Run, scorer: str, samples: pl.DataFrame) -> pl.DataFrame:
    """(sample_id, scorer_id) of the samples that the scorer applies to."""
    if scorer == "teacher_loglik":
        teacher = model_id(run.profile.resolve(run.profile.models.teacher))
        engine = run.profile.teacher.engine
        by = [run.profile.engine_version(engine)] if engine == "vllm" else []  # the others agree up to rounding
        scorer_id = digest("teacher_loglik", teacher, run.profile.scoring_id(), *by)
        return samples.select("sample_id", scorer_id=pl.lit(scorer_id))
    rows = samples.filter(pl.col("verifier").is_not_null())
    return rows.select("sample_id").with_columns(verifiers.scorer_ids(rows))


def _scored(run: Run, scorer: str, wanted: pl.DataFrame) -> pl.DataFrame:
    """(sample_id, scorer_id, score) of those `wanted` that the lake has."""
    found = run.lake.sql(
        "SELECT sample_id, scorer_id, score FROM scores WHERE scorer = ? "
        "AND sample_id IN (SELECT unnest(?::VARCHAR[]))",
        [scorer, wanted["sample_id"].to_list()],
    )
    return found.join(wanted, on=["sample_id", "scorer_id"], how="semi")


def _compute(run: Run, slice: str, scorer: str, missing: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Frames (sample_id, scorer_id, score), a chunk at a time."""
    what = f"{ASSET}[{slice}]: {scorer}"
    if scorer == "verifier":
        progress = run.progress(what, missing.height)
        for chunk in missing.iter_slices(CHUNK):
            scores = pl.Series("score", list(_verified(chunk)), dtype=pl.Float64)
            yield chunk.select("sample_id", "scorer_id").with_columns(scores)
            progress.advance(chunk.height)
    elif missing.height:
        from nbg_core.models import check_same_tokenizer  # torch: only where a model runs
        from nbg_core.teacher.score import token_logprobs

        path = run.profile.resolve(run.profile.models.teacher)
        check_same_tokenizer(run.policy.path, path, trust_remote_code=run.profile.models.trust_remote_code)
        for chunk in token_logprobs(run, path, missing, what):
            means = chunk.select("sample_id", score=pl.col("token_logprobs").cast(pl.List(pl.Float64)).list.mean())
            yield means.join(missing.select("sample_id", "scorer_id"), on="sample_id")


def _verified(chunk: pl.DataFrame) -> Iterator[float]:
    """Scores of the rows; equal responses to a query are verified once."""
    known: dict[tuple[str, str], float] = {}
    for row in chunk.iter_rows(named=True):
        key = (row["query_id"], row["text"])
        if key not in known:
            args = json.loads(row["verifier_args"] or "{}")
            try:
                known[key] = verifiers.verify(row["text"], row["answer"], row["verifier"], args, row["prompt"])
            except verifiers.SpecError as e:
                raise verifiers.SpecError(f"query {row['query_id']}: {e}; correct its row in the query file") from e
        yield known[key]
