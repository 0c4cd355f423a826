"""Asset `student_eval`, tables `evaluations` and `promotions`: held-out accuracy of the model before training, the
checkpoint and the teacher, and the promotion gate.

Answers are decoded greedily and verified by the query's own verifier. They are kept, so a model answers a query once:
when the query's reference answer or verifier is corrected, the kept text is verified again.

Each model gets prompts in its own chat template. They fit the student's context, since `queries` drops longer ones;
whether they fit the teacher's is not checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from nbg_core.base import ids
from nbg_core.base.progress import CommitBuffer
from nbg_core.config import identity
from nbg_core.config.slices import slice_names
from nbg_core.evaluation.accuracy import summarise
from nbg_core.evaluation.promotion import gate_refusal, promotion
from nbg_core.lake.queries import checkpoint_row
from nbg_core.lake.records import Write
from nbg_core.lineage.policy import checkpoint_folder
from nbg_core.lineage.run import Report, Run
from nbg_core.sampling.backends import open_sampler
from nbg_core.sampling.sampler import Decoding, SamplingRequest
from nbg_core.scorers.verifiers import scorer_ids, verify

ASSET = "student_eval"
KEY = ["query_id", "scorer_id"]
"""Columns that identify a verified answer of a model: the query, and what it was verified with."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(Report):
    checkpoint_id: str
    """The checkpoint that was evaluated."""
    summary: list[dict]
    """Rows of `accuracy.summarise`."""
    gate: str
    """'passed', or why the checkpoint may not be promoted."""
    promoted: bool
    """Whether this run promoted it."""


def materialise(run: Run, slice_name: None = None) -> EvaluationReport:
    """Evaluate the newest checkpoint, the model that it was trained from and the teacher on every held-out query.

    Raises LookupError without a checkpoint, ValueError without held-out queries."""
    snapshot, inputs = run.read_upstream(ASSET, None)
    (checkpoint,) = (i.data_version for i in inputs if i.asset == "student_checkpoint")
    queries = run.lake.sql(
        "SELECT * FROM queries WHERE split = 'eval' AND verifier IS NOT NULL AND slice IN (SELECT unnest(?)) "
        "ORDER BY slice, query_id",
        [slice_names(run.profile)],
        snapshot=snapshot,
    )
    if queries.is_empty():
        raise ValueError("no held-out query has a verifier; raise queries.eval_fraction, or add answers and verifiers")
    teacher = run.profile.resolve(run.profile.models.teacher)
    after = _folder(run, checkpoint)
    models = {"before": _parent(run, checkpoint), "after": after, "teacher": teacher}
    queries = queries.with_columns(scorer_ids(queries))
    new_rows = sum(_evaluate(run, role, path, queries, inputs) for role, path in models.items())
    answering_id = identity.answering_id(run.profile)
    model_ids = {role: ids.model_id(path) for role, path in models.items()}
    version = ids.content_version(
        f"{model_id}:{answering_id}:{query_id}:{scorer_id}"
        for model_id in model_ids.values()
        for query_id, scorer_id in queries[KEY].iter_rows()
    )
    summary = summarise(run.lake, answering_id, model_ids, snapshot)
    refusal = gate_refusal(summary, run.profile.evaluation.min_queries)
    promoted = refusal is None and run.profile.evaluation.auto_promote
    writes = [promotion(run.lake, checkpoint, "passed the promotion gate")] if promoted else []
    commit = run.commit(ASSET, None, writes, inputs=inputs, data_version=version)
    return EvaluationReport.of(
        commit, ASSET, None, version, rows=queries.height * len(models), new_rows=new_rows, checkpoint_id=checkpoint,
        summary=summary.to_dicts(), gate=refusal or "passed", promoted=promoted,
    )  # fmt: skip


def _evaluate(run: Run, role: str, path: Path, queries: pl.DataFrame, inputs) -> int:
    """Commit a model's missing rows of `evaluations`, and return their number.

    A query that the model has answered before is not answered again: only its kept answer is verified again."""
    model_id, answering_id = ids.model_id(path), identity.answering_id(run.profile)
    done = run.lake.sql(
        "SELECT query_id, scorer_id, text, finish_reason FROM evaluations WHERE model_id = ? AND settings_id = ?",
        [model_id, answering_id],
    )
    missing = queries.join(done, on=KEY, how="anti", maintain_order="left")
    run.log(f"{ASSET}: {role}: {queries.height - missing.height} of {queries.height} answers already there")
    if missing.is_empty():
        return 0

    def commit(answered: pl.DataFrame) -> int:
        scores = [
            verify(q["text"], q["answer"], q["verifier"], json.loads(q["verifier_args"] or "{}"), q["prompt"])
            for q in answered.iter_rows(named=True)
        ]
        rows = answered.select(*KEY, "slice", "text", "finish_reason").with_columns(
            model_id=pl.lit(model_id), settings_id=pl.lit(answering_id), score=pl.Series(scores, dtype=pl.Float64)
        )
        rows = rows.with_columns(correct=pl.col("score") >= 1)
        return run.commit(ASSET, None, [Write("evaluations", rows)], inputs=inputs).n_rows

    answers = done.unique("query_id", keep="first", maintain_order=True).drop("scorer_id")
    answered = missing.join(answers, on="query_id", maintain_order="left")
    unanswered = missing.join(answers, on="query_id", how="anti", maintain_order="left")
    new_rows = commit(answered) if answered.height else 0
    if unanswered.is_empty():
        return new_rows

    def commit_answers(answers: list[tuple[int, str, str]]) -> int:
        indices, texts, reasons = zip(*answers, strict=True)
        return commit(unanswered[list(indices)].with_columns(
            text=pl.Series(texts, dtype=pl.String), finish_reason=pl.Series(reasons, dtype=pl.String)
        ))  # fmt: skip

    settings = run.profile.evaluation
    greedy = Decoding(temperature=0.0, top_p=1.0, max_tokens=settings.max_tokens)
    with open_sampler(run, path, settings.batch_size) as sampler, CommitBuffer(commit_answers) as buffer:
        progress = run.progress(f"{ASSET}: {role}", unanswered.height)
        requests = [SamplingRequest(sampler.encode(messages), [0]) for messages in unanswered["messages"].to_list()]
        for start in range(0, len(requests), settings.batch_size):
            chunk = requests[start : start + settings.batch_size]
            for i, _, answer in sampler.stream(chunk, greedy):
                buffer.add((start + i, sampler.decode(answer.token_ids), answer.finish_reason))
                progress.advance(1)
            buffer.flush()
    return new_rows + buffer.new_rows


def _folder(run: Run, checkpoint: str) -> Path:
    """Folder of a checkpoint."""
    return checkpoint_folder(run.profile, checkpoint_row(run.lake, checkpoint)["path"])


def _parent(run: Run, checkpoint: str) -> Path:
    """Folder of the model that a checkpoint was trained from: the SFT student, or an earlier checkpoint."""
    parent_id = checkpoint_row(run.lake, checkpoint)["parent_model_id"]
    student = run.profile.resolve(run.profile.models.student)
    return student if ids.model_id(student) == parent_id else _folder(run, parent_id)
