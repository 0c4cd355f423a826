"""`student_eval`: accuracy on held-out queries before and after training, and of the teacher; the gate for promotion.

Answers are greedy, verified by the query's own verifier, and kept one row per model and query, so that a model is
never evaluated twice.
"""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from nbg_core import ids, lineage
from nbg_core.accuracy import checkpoint_row, gate, promote, summarise
from nbg_core.lake import Write
from nbg_core.preference.verifiers import verify
from nbg_core.run import Run
from nbg_core.sampling.sample import open_sampler
from nbg_core.sampling.sampler import Decoding, Request

ASSET = "student_eval"


def materialise(run: Run, slice: None = None) -> dict:
    """Evaluate the newest checkpoint, the model that it was trained from and the teacher on every held-out query.

    Raises LookupError without a checkpoint, ValueError without held-out queries."""
    snapshot = run.lake.snapshot()
    inputs = [lineage.input_of(run.lake, "student_checkpoint", None, snapshot)]
    inputs += [lineage.input_of(run.lake, "queries", s, snapshot) for s in lineage.slices(run.profile)]
    checkpoint = inputs[0].data_version
    queries = run.lake.sql(
        "SELECT * FROM queries WHERE split = 'eval' AND verifier IS NOT NULL AND slice IN (SELECT unnest(?)) "
        "ORDER BY slice, query_id",
        [lineage.slices(run.profile)],
        snapshot=snapshot,
    )
    if queries.is_empty():
        raise ValueError("no held-out query has a verifier; raise queries.eval_fraction, or add answers and verifiers")
    teacher = run.profile.resolve(run.profile.models.teacher)
    after = _folder(run, checkpoint)
    models = {"before": _parent(run, checkpoint), "after": after, "teacher": teacher}
    new_rows = sum(_evaluate(run, role, path, queries, inputs) for role, path in models.items())
    version = ids.content_version([f"{ids.model_id(p)}:{q}" for p in models.values() for q in queries["query_id"]])
    summary = summarise(run.lake, run.profile.answering_id(), {role: ids.model_id(p) for role, p in models.items()})
    refusal = gate(summary)
    promoted = refusal is None and run.profile.evaluation.auto_promote
    commit = run.commit(ASSET, None, inputs=inputs, data_version=version)
    if promoted:
        promote(run.lake, run.profile, checkpoint, "passed the promotion gate", run.run_id)
    return {
        "asset": ASSET, "slice": None, "snapshot": commit.snapshot, "data_version": version,
        "rows": queries.height * len(models), "new_rows": new_rows, "checkpoint_id": checkpoint,
        "summary": summary.to_dicts(), "gate": refusal or "passed",
        "promoted": promoted,
    }  # fmt: skip


def _evaluate(run: Run, role: str, path: Path, queries: pl.DataFrame, inputs) -> int:
    model, settings = ids.model_id(path), run.profile.answering_id()
    done = run.lake.sql("SELECT query_id FROM evaluations WHERE model_id = ? AND settings_id = ?", [model, settings])[
        "query_id"
    ]
    missing = queries.filter(~pl.col("query_id").is_in(done.implode()))
    run.log(f"{ASSET}: {role}: {queries.height - missing.height} of {queries.height} answers already there")
    if missing.is_empty():
        return 0
    e = run.profile.evaluation
    sampler = open_sampler(run.profile, path, e.batch_size)
    progress = run.progress(f"{ASSET}: {role}", missing.height)
    new_rows = 0
    for chunk in missing.iter_slices(e.batch_size):
        rows = []
        queries_ = list(chunk.iter_rows(named=True))
        answers = sampler.sample(
            [Request(sampler.encode(q["messages"]), [0]) for q in queries_], Decoding(0.0, 1.0, e.max_tokens)
        )
        for q, (answer,) in zip(queries_, answers, strict=True):
            text = sampler.decode(answer.token_ids)
            score = verify(text, q["answer"], q["verifier"], json.loads(q["verifier_args"] or "{}"), q["prompt"])
            rows.append({
                "model_id": model, "query_id": q["query_id"], "settings_id": settings, "slice": q["slice"],
                "score": score, "correct": score >= 1, "text": text, "finish_reason": answer.finish_reason,
            })  # fmt: skip
        new_rows += run.commit(ASSET, None, [Write("evaluations", pl.DataFrame(rows))], inputs=inputs).n_rows
        progress.advance(len(rows))
    return new_rows


def _folder(run: Run, checkpoint: str) -> Path:
    return run.profile.resolve(run.profile.paths.checkpoints) / checkpoint_row(run.lake, checkpoint)["path"]


def _parent(run: Run, checkpoint: str) -> Path:
    """Folder of the model a checkpoint was trained from: the SFT student, or an earlier checkpoint."""
    parent = checkpoint_row(run.lake, checkpoint)["parent_model_id"]
    student = run.profile.resolve(run.profile.models.student)
    return student if ids.model_id(student) == parent else _folder(run, parent)
