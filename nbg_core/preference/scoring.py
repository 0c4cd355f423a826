"""Scores the responses of a slice: computes and commits scores that the lake does not have, and reads the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from nbg_core.base.names import find
from nbg_core.base.progress import Progress
from nbg_core.config.identity import IDENTITIES
from nbg_core.lake.records import Input, Write
from nbg_core.lineage.run import Run
from nbg_core.scorers.scorers import SCORERS, Scorer

ASSET = "filtered_pairs"


@dataclass(frozen=True)
class StageContext:
    """The `scorers.Context` of a run; its methods are documented there."""

    run: Run
    what: str
    """What progress messages start with."""

    def identity(self, name: str) -> object:
        return find(IDENTITIES, name, "identity")(self.run.profile)

    def progress(self, total: int) -> Progress:
        return self.run.progress(self.what, total)

    def teacher_logprobs(self, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Raises ValueError when the teacher has another tokenizer than the student."""
        from nbg_core.modeling.loading import check_same_tokenizer  # imports torch: only needed where a model runs
        from nbg_core.teacher.engine import token_logprobs

        models = self.run.profile.models
        path = self.run.profile.resolve(models.teacher)
        check_same_tokenizer(self.run.policy.path, path, trust_remote_code=models.trust_remote_code)
        yield from token_logprobs(self.run, path, samples, self.what)


def score_samples(
    run: Run, slice_name: str, samples: pl.DataFrame, inputs: Sequence[Input]
) -> tuple[dict[str, pl.DataFrame], int]:
    """Compute and commit missing scores. Returns (scorer name -> frame (sample_id, score), number of new scores).

    Only scorers with a weight are used. `samples` is a frame of `lake.queries.current_samples`. Raises SpecError naming
    the query whose verifier cannot work, and ValueError when the teacher has another tokenizer than the student."""
    scores, new_rows = {}, 0
    for name in sorted(name for name, weight in run.profile.preference.weights.items() if weight):
        scorer = find(SCORERS, name, "scorer")
        context = StageContext(run, f"{ASSET}[{slice_name}]: {name}")
        wanted = samples.join(scorer.ids(context, samples), on="sample_id", maintain_order="left")
        done = _scored(run, scorer, wanted)
        missing = wanted.join(done, on=["sample_id", "scorer_id"], how="anti", maintain_order="left")
        run.log(f"{context.what}: {wanted.height - missing.height} of {wanted.height} already scored")
        if missing.height:
            for chunk in scorer.compute(context, missing.drop("scorer_id")):
                rows = chunk.join(missing.select("sample_id", "scorer_id"), on="sample_id", maintain_order="left")
                rows = rows.with_columns(slice=pl.lit(slice_name), scorer=pl.lit(name))
                new_rows += run.commit(ASSET, slice_name, [Write("scores", rows)], inputs=inputs).n_rows
        scores[name] = _scored(run, scorer, wanted).select("sample_id", "score").sort("sample_id")
    return scores, new_rows


def _scored(run: Run, scorer: Scorer, wanted: pl.DataFrame) -> pl.DataFrame:
    """The scores that the lake has of `wanted` (sample_id, scorer_id): sample_id, scorer_id, score."""
    found = run.lake.sql(
        "SELECT sample_id, scorer_id, score FROM scores WHERE scorer = ? "
        "AND sample_id IN (SELECT unnest(?::VARCHAR[]))",
        [scorer.name, wanted["sample_id"].to_list()],
    )
    return found.join(wanted, on=["sample_id", "scorer_id"], how="semi")
