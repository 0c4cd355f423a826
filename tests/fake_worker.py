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

from nbg_core.assets import get, upstream_partitions
from nbg_core.base import ids
from nbg_core.config import identity
from nbg_core.config.load import load_profile
from nbg_core.config.slices import slice_names
from nbg_core.evaluation.accuracy import latest_summary
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import input_of, latest_materialisation
from nbg_core.lake.records import Write
from nbg_core.lake.tables import polars_schema
from nbg_core.lake.teacher_columns import GAP_ZERO, TEACHER_COLUMNS
from nbg_core.lineage.run import Run
from nbg_core.losses.metrics import METRICS
from nbg_core.runtime.run_worker import WorkerFailed
from nbg_core.scorers.verifiers import scorer_ids

TRAIN, HELD_OUT = 3, 10
"""Queries per slice: the first TRAIN are trained on, the others held out."""


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

    def __call__(self, asset: str, slice_name: str | None, run_id: str, *, profile: str, on_line) -> dict:
        self.calls.append((asset, slice_name))
        on_line(f"{asset}: working")
        if asset in self.fail:
            raise WorkerFailed(self.fail[asset], ["last line of the log"], Path("worker.log"))
        loaded = load_profile(profile)
        self.lake = self.lake or Lake.of(loaded)
        run = Run(loaded, self.lake, run_id, log=on_line)
        snapshot = run.lake.snapshot()
        partitions = upstream_partitions(asset, slice_name, slice_names(loaded))
        inputs = [input_of(run.lake, *partition, snapshot) for partition in partitions]
        made = _ROWS[asset](run, slice_name) if asset in _ROWS else _no_rows(asset)
        if asset in self.spoil:
            made = [(made[0][0], self.spoil[asset](made[0][1])), *made[1:]]
        main = made[0][1]
        if asset == "student_checkpoint":
            version = main["checkpoint_id"][0]
        else:
            version = ids.content_version([str(row) for row in main.rows()])
        writes = [Write(t, df, "slice = ?", (slice_name,)) if slice_name else Write(t, df) for t, df in made]
        before = latest_materialisation(run.lake, asset, slice_name)
        new_rows = 0 if before and before["data_version"] == version else main.height
        commit = run.commit(asset, slice_name, writes, inputs=inputs, data_version=version)
        summary = latest_summary(run.lake)[1].to_dicts() if asset == "student_eval" else []
        more = {"training_id": TRAINING} if asset == "student_checkpoint" else {}
        if asset == "teacher_logits":
            more = {"storage_id": main["settings_id"][0], "teacher_model_id": main["model_id"][0]}
        return more | {"asset": asset, "slice": slice_name, "snapshot": commit.snapshot, "data_version": version,
                "rows": main.height, "new_rows": new_rows, "counts": {"kept": main.height},
                "summary": summary, "share": 0.5}  # fmt: skip


def _no_rows(asset: str) -> list:
    """Of an asset that has no handmade rows: its first table, empty."""
    table = get(asset).tables[0]
    schema = {name: dtype for name, dtype in polars_schema(table).items() if name != "materialisation_id"}
    return [(table, pl.DataFrame(schema=schema))]


def _train_queries(slice_name: str) -> list[str]:
    return [f"{slice_name}-{i}" for i in range(TRAIN)]


def _samples_of(slice_name: str) -> list[tuple[str, str]]:
    return [(q, f"{q}-{j}") for q in _train_queries(slice_name) for j in range(2)]


def _queries(run: Run, slice_name: str) -> list:
    return [("queries", pl.DataFrame([
        {"slice": slice_name, "query_id": f"{slice_name}-{i}", "split": "train" if i < TRAIN else "eval",
         "messages": [{"role": "user", "content": f"{slice_name} {i}"}], "prompt": f"{slice_name} | {i}", "answer": "1",
         "verifier": "exact", "verifier_args": None, "source_file": f"{slice_name}.jsonl", "source_line": i + 1}
        for i in range(TRAIN + HELD_OUT)
    ]))]  # fmt: skip


def _samples(run: Run, slice_name: str) -> list:
    return [("samples", pl.DataFrame([
        {"slice": slice_name, "sample_id": s, "query_id": q, "source": "student", "model_id": run.policy.model_id,
         "sampling_id": identity.sampling_id(run.profile), "sample_index": int(s[-1]), "seed": 1,
         "prompt_token_ids": [1, 2], "token_ids": [3, 63], "logprobs": [-0.1, -0.2], "finish_reason": "stop",
         "text": "text"}
        for q, s in _samples_of(slice_name)
    ]))]  # fmt: skip


def _pairs(run: Run, slice_name: str) -> list:
    pairs = [
        {"slice": slice_name, "pair_id": f"{q}-pair", "query_id": q, "chosen_id": f"{q}-0", "rejected_id": f"{q}-1",
         "chosen_score": 1.0, "rejected_score": 0.0, "margin": 1.0}
        for q in _train_queries(slice_name)
    ]  # fmt: skip
    scores = [
        {"slice": slice_name, "sample_id": s, "scorer": "verifier", "scorer_id": "v", "score": float(s.endswith("0"))}
        for _, s in _samples_of(slice_name)
    ]
    return [("pairs", pl.DataFrame(pairs)), ("scores", pl.DataFrame(scores))]


def _teacher(run: Run, slice_name: str) -> list:
    teacher = ids.model_id(run.profile.resolve(run.profile.models.teacher))
    half, gaps = math.log(0.5), [GAP_ZERO + gap for gap in (3.0, 4.0, 1.0, 63.0)]
    return [("teacher_logits", pl.DataFrame([
        {column.name: [0] * (2 if column.per == "position" else len(gaps)) for column in TEACHER_COLUMNS}
        | {"slice": slice_name, "sample_id": s, "model_id": teacher, "settings_id": identity.storage_id(run.profile),
           "token_logprobs": [half, 0.0], "tail_logmass": [half, -math.inf], "head_counts": [1, 1],
           "tail_counts": [2, 0], "entry_gaps": gaps, "entry_logprobs": [half, -2.0, -3.0, 0.0]}
        for _, s in _samples_of(slice_name)
    ]))]  # fmt: skip


def _reference(run: Run, slice_name: str) -> list:
    return [("reference_logprobs", pl.DataFrame([
        {"slice": slice_name, "sample_id": s, "model_id": run.policy.model_id, 
         "settings_id": identity.scoring_id(run.profile),
         "token_logprobs": [-0.1, -0.2]}
        for _, s in _samples_of(slice_name)
    ]))]  # fmt: skip


def _checkpoint(run: Run, slice_name: None) -> list:
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
    steps = pl.DataFrame([
        {"training_id": TRAINING, "step": i} | {metric.name: 1.0 / (i + 1) for metric in METRICS}
        | {"margin": 0.1 * i, "dpo": math.log(2) - 0.1 * i} | ({} if i else STEP_0)
        for i in range(3)
    ])  # fmt: skip
    return [("checkpoints", pl.DataFrame([row])), ("checkpoint_pairs", used), ("training_steps", steps)]


def _evaluations(run: Run, slice_name: None) -> list:
    newest = run.lake.sql("SELECT * FROM checkpoints ORDER BY snapshot_id DESC LIMIT 1").row(0, named=True)
    right = {newest["parent_model_id"]: False, newest["checkpoint_id"]: True, newest["teacher_model_id"]: True}
    queries = run.lake.sql("SELECT * FROM queries WHERE split = 'eval' ORDER BY query_id")
    queries = queries.with_columns(scorer_ids(queries)).select("query_id", "slice", "scorer_id")
    return [("evaluations", pl.DataFrame([
        {"model_id": model, "query_id": q, "settings_id": identity.answering_id(run.profile),
         "scorer_id": v, "slice": s,
         "score": float(correct), "correct": correct, "text": "1", "finish_reason": "stop"}
        for model, correct in right.items() for q, s, v in queries.iter_rows()
    ]))]  # fmt: skip


_ROWS = {
    "queries": _queries, "student_samples": _samples, "filtered_pairs": _pairs, "teacher_logits": _teacher,
    "reference_logprobs": _reference, "student_checkpoint": _checkpoint, "student_eval": _evaluations,
}  # fmt: skip
