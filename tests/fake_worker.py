"""A stand-in for `run_worker`: each stage commits a few handmade rows, in milliseconds and without a model.

Slices are whatever files lie in the queries folder. `Fake.spoil[asset]` changes an asset's rows before the commit,
`Fake.fail[asset]` makes its worker fail with that sentence, `Fake.calls` is what ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import yaml

from nbg_core import accuracy, ids, lineage
from nbg_core.config import load_profile
from nbg_core.lake import Lake, Write
from nbg_core.preference.verifiers import scorer_ids
from nbg_core.processes import WorkerFailed
from nbg_core.run import Run
from nbg_core.schemas import GAP_ZERO

QUERIES = 4
"""Queries per slice; the last is held out."""


def write_profile(folder: Path, slices: tuple[str, ...] = ("a", "b"), **sections) -> Path:
    """A profile file below `folder` with two models that are only files, and empty query files."""
    for model in ("student", "teacher"):
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text('{"vocab_size": 64}')
        (folder / model / "model.safetensors").write_text(model)
    (folder / "queries").mkdir()
    for name in slices:
        (folder / "queries" / f"{name}.jsonl").write_text("{}\n")
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump({
        "name": "test", "root": str(folder), "models": {"student": "student", "teacher": "teacher"},
        "paths": {"queries": "queries", "work": "work", "checkpoints": "checkpoints"},
        "lake": {"catalog": "sqlite:lake/catalog.sqlite", "data_path": "lake/files"},
        "sampling": {"n_student": 2}, **sections,
    }))  # fmt: skip
    return path


TRAINING = "training"
STEP_0 = {"margin": 0.0, "dpo": math.log(2)}
"""Metrics of a training's step 0."""


@dataclass
class Fake:
    spoil: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = field(default_factory=dict)
    fail: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, str | None]] = field(default_factory=list)
    lake: Lake | None = None

    def __call__(self, asset: str, slice: str | None, run_id: str, *, profile: str, on_line) -> dict:
        self.calls.append((asset, slice))
        on_line(f"{asset}: working")
        if asset in self.fail:
            raise WorkerFailed(self.fail[asset], ["last line of the log"], Path("worker.log"))
        loaded = load_profile(profile)
        self.lake = self.lake or Lake.of(loaded)
        run = Run(loaded, self.lake, run_id, log=on_line)
        snapshot = run.lake.snapshot()
        inputs = [
            lineage.input_of(run.lake, a, s, snapshot)
            for a in lineage.UPSTREAM[asset]
            for s in ([None] if a in lineage.UNPARTITIONED else [slice] if slice else lineage.slices(loaded))
        ]
        made = _ROWS[asset](run, slice)
        if asset in self.spoil:
            made = [(made[0][0], self.spoil[asset](made[0][1])), *made[1:]]
        main = made[0][1]
        if asset == "student_checkpoint":
            version = main["checkpoint_id"][0]
        else:
            version = ids.content_version([str(row) for row in main.rows()])
        writes = [Write(t, df, "slice = ?", (slice,)) if slice else Write(t, df) for t, df in made]
        before = lineage.latest(run.lake, asset, slice)
        new_rows = 0 if before and before["data_version"] == version else main.height
        commit = run.commit(asset, slice, writes, inputs=inputs, data_version=version)
        summary = accuracy.latest_summary(run.lake)[1].to_dicts() if asset == "student_eval" else []
        return {"asset": asset, "slice": slice, "snapshot": commit.snapshot, "data_version": version,
                "rows": main.height, "new_rows": new_rows, "counts": {"kept": main.height},
                "summary": summary, "share": 0.5}  # fmt: skip


def _train_queries(slice: str) -> list[str]:
    return [f"{slice}-{i}" for i in range(QUERIES - 1)]


def _samples_of(slice: str) -> list[tuple[str, str]]:
    return [(q, f"{q}-{j}") for q in _train_queries(slice) for j in range(2)]


def _queries(run: Run, slice: str) -> list:
    return [("queries", pl.DataFrame([
        {"slice": slice, "query_id": f"{slice}-{i}", "split": "train" if i < QUERIES - 1 else "eval",
         "messages": [{"role": "user", "content": f"{slice} {i}"}], "prompt": f"{slice} | {i}", "answer": "1",
         "verifier": "exact", "verifier_args": None, "source_file": f"{slice}.jsonl", "source_line": i + 1}
        for i in range(QUERIES)
    ]))]  # fmt: skip


def _samples(run: Run, slice: str) -> list:
    return [("samples", pl.DataFrame([
        {"slice": slice, "sample_id": s, "query_id": q, "source": "student", "model_id": run.policy.model_id,
         "sampling_id": run.profile.sampling_id(), "sample_index": int(s[-1]), "seed": 1,
         "prompt_token_ids": [1, 2], "token_ids": [3, 63], "logprobs": [-0.1, -0.2], "finish_reason": "stop",
         "text": "text"}
        for q, s in _samples_of(slice)
    ]))]  # fmt: skip


def _pairs(run: Run, slice: str) -> list:
    pairs = [
        {"slice": slice, "pair_id": f"{q}-pair", "query_id": q, "chosen_id": f"{q}-0", "rejected_id": f"{q}-1",
         "chosen_score": 1.0, "rejected_score": 0.0, "margin": 1.0}
        for q in _train_queries(slice)
    ]  # fmt: skip
    scores = [
        {"slice": slice, "sample_id": s, "scorer": "verifier", "scorer_id": "v", "score": float(s.endswith("0"))}
        for _, s in _samples_of(slice)
    ]
    return [("pairs", pl.DataFrame(pairs)), ("scores", pl.DataFrame(scores))]


def _teacher(run: Run, slice: str) -> list:
    teacher = ids.model_id(run.profile.resolve(run.profile.models.teacher))
    half, gaps = math.log(0.5), [GAP_ZERO + gap for gap in (3.0, 4.0, 1.0, 63.0)]
    return [("teacher_logits", pl.DataFrame([
        {"slice": slice, "sample_id": s, "model_id": teacher, "settings_id": run.profile.storage_id(),
         "token_logprobs": [half, 0.0], "tail_logmass": [half, -math.inf], "head_counts": [1, 1],
         "tail_counts": [2, 0], "entry_gaps": gaps, "entry_logprobs": [half, -2.0, -3.0, 0.0]}
        for _, s in _samples_of(slice)
    ]))]  # fmt: skip


def _reference(run: Run, slice: str) -> list:
    return [("reference_logprobs", pl.DataFrame([
        {"slice": slice, "sample_id": s, "model_id": run.policy.model_id, "settings_id": run.profile.scoring_id(),
         "token_logprobs": [-0.1, -0.2]}
        for _, s in _samples_of(slice)
    ]))]  # fmt: skip


def _checkpoint(run: Run, slice: None) -> list:
    folder = run.profile.resolve(run.profile.paths.checkpoints)
    (folder / "new").mkdir(parents=True, exist_ok=True)
    (folder / "new" / "config.json").write_text('{"vocab_size": 64}')
    (folder / "new" / "model.safetensors").write_text("trained")
    checkpoint = ids.model_id(folder / "new")
    pairs = run.lake.sql("SELECT pair_id, slice FROM pairs ORDER BY pair_id")
    teacher = ids.model_id(run.profile.resolve(run.profile.models.teacher))
    row = {"checkpoint_id": checkpoint, "training_id": TRAINING, "path": "new", "teacher_model_id": teacher,
           "parent_model_id": run.policy.model_id, "input_snapshot": run.lake.snapshot(), "n_pairs": pairs.height,
           "n_steps": 3, "settings": "{}", "created_at": datetime.now(UTC)}  # fmt: skip
    used = pairs.with_columns(
        training_id=pl.lit(TRAINING), checkpoint_id=pl.lit(checkpoint), step=pl.lit(0, pl.Int64),
        epoch=pl.lit(0, pl.Int32),
    )  # fmt: skip
    metrics = ("loss kl_chosen kl_rejected nll accuracy chosen_reward rejected_reward chosen_logp rejected_logp "
               "grad_norm learning_rate tokens_per_second data_wait").split()  # fmt: skip
    steps = pl.DataFrame([
        {"training_id": TRAINING, "step": i, "margin": 0.1 * i, "dpo": math.log(2) - 0.1 * i}
        | dict.fromkeys(metrics, 1.0 / (i + 1)) | ({} if i else STEP_0)
        for i in range(3)
    ])  # fmt: skip
    return [("checkpoints", pl.DataFrame([row])), ("checkpoint_pairs", used), ("training_steps", steps)]


def _evaluations(run: Run, slice: None) -> list:
    newest = run.lake.sql("SELECT * FROM checkpoints ORDER BY created_at DESC LIMIT 1").row(0, named=True)
    right = {newest["parent_model_id"]: False, newest["checkpoint_id"]: True, newest["teacher_model_id"]: True}
    queries = run.lake.sql("SELECT * FROM queries WHERE split = 'eval' ORDER BY query_id")
    queries = queries.with_columns(scorer_ids(queries)).select("query_id", "slice", "scorer_id")
    return [("evaluations", pl.DataFrame([
        {"model_id": model, "query_id": q, "settings_id": run.profile.answering_id(), "scorer_id": v, "slice": s,
         "score": float(correct), "correct": correct, "text": "1", "finish_reason": "stop"}
        for model, correct in right.items() for q, s, v in queries.iter_rows()
    ]))]  # fmt: skip


_ROWS = {
    "queries": _queries, "student_samples": _samples, "filtered_pairs": _pairs, "teacher_logits": _teacher,
    "reference_logprobs": _reference, "student_checkpoint": _checkpoint, "student_eval": _evaluations,
}  # fmt: skip
