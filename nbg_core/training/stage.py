"""`student_checkpoint`: train the policy on the pairs of all slices with the joint loss.

The worker writes the training set to files, starts the deepspeed launcher on `nbg_core.training.train`, and commits the
result in one transaction: the checkpoint, the pairs of each step, and the metrics. Until then everything is in
`<paths.work>/training/<training id>`, where a run that was killed continues. The folder is removed after the commit.

The launcher stays in the worker's process group, and its ranks end when the worker does (`TIED_TO_STDIN`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from nbg_core.base import ids
from nbg_core.base.files import link_folder
from nbg_core.config import identity
from nbg_core.config.identity import CODE_VERSION
from nbg_core.config.slices import slice_names
from nbg_core.lake.records import Commit, Write
from nbg_core.lineage.run import Report, Run
from nbg_core.training.launcher import launch
from nbg_core.training.pair_files import PairFiles, write_pair_files
from nbg_core.training.pairs import count_and_hash_pairs
from nbg_core.training.plan import Plan
from nbg_core.training.request import ASSET, TrainingError, TrainingRequest

USES_AT_ONCE = 200_000
"""Rows of `checkpoint_pairs` in memory at once: a training may use millions of pairs many times."""


@dataclass(frozen=True, kw_only=True)
class CheckpointReport(Report):
    training_id: str
    checkpoint_id: str
    n_pairs: int
    n_steps: int
    """Number of optimizer steps."""
    path: str
    """Folder of the weights."""
    first: dict
    """Metrics of the first step."""
    last: dict
    """Metrics of the last step."""
    tokens_per_second: float
    """Median over the optimizer steps."""
    seconds: float | None
    """Duration of training, without the commit; None if an earlier run has trained."""


def materialise(run: Run, slice_name: None = None) -> CheckpointReport:
    """Train, unless the lake has a checkpoint of exactly this training.

    Raises LookupError when an upstream partition was never materialised, ValueError without pairs, TrainingError when
    the data does not fit together or training fails."""
    profile, lake = run.profile, run.lake
    slices = slice_names(profile)
    snapshot, inputs = run.read_upstream(ASSET, None)
    teacher = ids.model_id(profile.resolve(profile.models.teacher))
    trainings = profile.resolve(profile.paths.work) / "training"
    n_pairs, content = count_and_hash_pairs(lake, snapshot, slices, trainings / "spill")
    plan = Plan(n_pairs, profile.training)
    training_id = ids.digest(
        "training", identity.settings_id(run.settings(ASSET, None)), content,
        sorted([i.asset, i.slice_name, i.data_version] for i in inputs), CODE_VERSION,
    )  # fmt: skip
    checkpoints = profile.resolve(profile.paths.checkpoints)
    work = trainings / training_id
    if (made := _made_before(run, training_id, checkpoints)) is not None:
        run.log(f"{ASSET}: checkpoint {made} was made by exactly this training; nothing to do")
        commit = run.commit(ASSET, None, inputs=inputs, data_version=made)
        shutil.rmtree(work, ignore_errors=True)  # left by a kill right after the first commit
        return _report(run, commit, training_id, made, n_pairs, new_rows=0, seconds=None)
    hostfile = profile.training.hostfile
    request = TrainingRequest(
        training_id=training_id, catalog=lake.catalog, data_path=lake.data_path, snapshot=snapshot, slices=slices,
        policy_id=run.policy.model_id, policy_path=run.policy.path, teacher_id=teacher,
        storage_id=identity.storage_id(profile), scoring_id=identity.scoring_id(profile),
        temperature=profile.teacher.temperature,
        training=profile.training.model_copy(update={"hostfile": hostfile and profile.resolve(hostfile)}),
        work=work,
        trust_remote_code=profile.models.trust_remote_code, threads=profile.threads,
    )  # fmt: skip
    began = time.monotonic()
    write_pair_files(lake, request, run.log)
    if not request.final.is_dir():
        launch(run, request)
    seconds = time.monotonic() - began
    metrics = pl.read_ndjson(request.steps_file)
    if metrics["step"].to_list() != list(range(len(plan))):
        raise TrainingError(
            f"{request.steps_file} does not hold the {len(plan)} steps of this training; delete {request.work} and "
            "materialise student_checkpoint again"
        )
    checkpoint = _place(request, checkpoints)
    writes = _writes(run, request, checkpoint, plan, metrics)
    commit = run.commit(ASSET, None, writes, inputs=inputs, data_version=checkpoint)
    shutil.rmtree(request.work)
    return _report(run, commit, training_id, checkpoint, n_pairs, new_rows=1, seconds=seconds)


def _made_before(run: Run, training_id: str, checkpoints: Path) -> str | None:
    """The checkpoint of this training, if the lake knows one and its folder is there."""
    rows = run.lake.sql("SELECT checkpoint_id FROM checkpoint_pairs WHERE training_id = ? LIMIT 1", [training_id])
    return next((c for c in rows["checkpoint_id"] if (checkpoints / c).is_dir()), None)


def _place(request: TrainingRequest, checkpoints: Path) -> str:
    """Put the trained model among the checkpoints, under the hash of its content. It also stays where it is: until the
    commit, nothing else knows that this training is done."""
    checkpoint = ids.model_id(request.final)
    if not (checkpoints / checkpoint).is_dir():  # the same weights may come from other settings, too
        link_folder(request.final, checkpoints / checkpoint)
    return checkpoint


def _writes(run: Run, request: TrainingRequest, checkpoint: str, plan: Plan, metrics: pl.DataFrame) -> list[Write]:
    pair_files = PairFiles(request.rows_path)
    row = {
        "checkpoint_id": checkpoint, "training_id": request.training_id, "path": checkpoint,
        "parent_model_id": request.policy_id, "teacher_model_id": request.teacher_id,
        "input_snapshot": request.snapshot, "n_pairs": pair_files.n_pairs, "n_steps": len(plan),
        "settings": json.dumps(run.settings(ASSET, None), sort_keys=True, default=str), "created_at": datetime.now(UTC),
    }  # fmt: skip
    training = pl.lit(request.training_id).alias("training_id")
    at_once = max(1, USES_AT_ONCE // request.training.global_batch_pairs)

    def used() -> Iterator[pl.DataFrame]:
        for i in range(0, len(plan), at_once):
            some = [plan[j] for j in range(i, min(i + at_once, len(plan)))]
            n = [len(step.pairs) for step in some]
            yield pair_files.names(np.concatenate([step.pairs for step in some])).with_columns(
                training,
                pl.lit(checkpoint).alias("checkpoint_id"),
                pl.Series("step", np.repeat([step.index for step in some], n), pl.Int64),
                pl.Series("epoch", np.repeat([step.epoch for step in some], n), pl.Int32),
            )

    return [
        Write("checkpoints", pl.DataFrame([row])),
        Write("checkpoint_pairs", used),
        Write("training_steps", metrics.with_columns(training)),
    ]


def _report(
    run: Run, commit: Commit, training_id: str, checkpoint: str, n_pairs: int, *, new_rows: int, seconds: float | None
) -> CheckpointReport:
    steps = run.lake.sql(
        "SELECT * EXCLUDE (training_id, materialisation_id) FROM training_steps WHERE training_id = ? ORDER BY step",
        [training_id],
    )
    folder = run.profile.resolve(run.profile.paths.checkpoints) / checkpoint
    return CheckpointReport.of(
        commit, ASSET, None, checkpoint, rows=1, new_rows=new_rows, training_id=training_id, checkpoint_id=checkpoint,
        n_pairs=n_pairs, n_steps=steps.height, path=str(folder), first=steps.row(0, named=True),
        last=steps.row(-1, named=True), tokens_per_second=steps["tokens_per_second"].median(), seconds=seconds,
    )  # fmt: skip
