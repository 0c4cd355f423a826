"""`student_checkpoint`: train the policy on the pairs of all slices with the joint loss.

The worker reads what the training set is, starts the deepspeed launcher on `nbg_core.training.train`, and commits the
result: checkpoint, which pair at which step, and metrics, in one transaction. Everything on the way lies in
`<paths.work>/training/<training id>`, so a run that was killed continues there; the folder goes with the commit.

The launcher stays in the worker's process group, and its ranks end when the worker does (`TIED_TO_STDIN`).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import psutil

from nbg_core import ids, lineage
from nbg_core.files import link_folder
from nbg_core.lake import CODE_VERSION, Write
from nbg_core.run import Run
from nbg_core.training.pairs import survey
from nbg_core.training.plan import Plan
from nbg_core.training.request import ASSET, TIED_TO_STDIN, Request, TrainingError
from nbg_core.training.rows import Rows, write_rows

UPSTREAM = lineage.UPSTREAM[ASSET]
LOG_TAIL = 20
USES_AT_ONCE = 200_000
"""Rows of `checkpoint_pairs` in memory at once: a training may use millions of pairs many times."""
REMOTE_GRACE_SECONDS = 5.0
"""What a launcher with ranks on other machines gets to end them."""


def materialise(run: Run, slice: None = None) -> dict:
    """Train, unless the lake has a checkpoint of exactly this training.

    Raises LookupError when an upstream partition was never materialised, ValueError without pairs, TrainingError when
    the data does not fit together or training fails."""
    profile, lake = run.profile, run.lake
    snapshot = lake.snapshot()
    slices = lineage.slices(profile)
    inputs = [lineage.input_of(lake, asset, s, snapshot) for asset in UPSTREAM for s in slices]
    teacher = ids.model_id(profile.resolve(profile.models.teacher))
    trainings = profile.resolve(profile.paths.work) / "training"
    n_pairs, content = survey(lake, snapshot, slices, trainings / "survey")
    steps = Plan(n_pairs, profile.training)
    training_id = ids.digest(
        "training", lineage.settings_id(run.settings(ASSET, None)), content,
        sorted([i.asset, i.slice, i.data_version] for i in inputs), CODE_VERSION,
    )  # fmt: skip
    checkpoints = profile.resolve(profile.paths.checkpoints)
    report = {"asset": ASSET, "slice": None, "training_id": training_id, "n_pairs": n_pairs, "n_steps": len(steps)}
    work = trainings / training_id
    if (made := _made_before(run, training_id, checkpoints)) is not None:
        run.log(f"{ASSET}: checkpoint {made} is of exactly this training; nothing to do")
        commit = run.commit(ASSET, None, inputs=inputs, data_version=made)
        shutil.rmtree(work, ignore_errors=True)  # what a kill right after the first commit left
        return report | _result(run, training_id, made, checkpoints, commit.snapshot, 0)
    hostfile = profile.training.hostfile
    request = Request(
        training_id=training_id, catalog=lake.catalog, data_path=lake.data_path, snapshot=snapshot, slices=slices,
        policy_id=run.policy.model_id, policy_path=run.policy.path, teacher_id=teacher,
        storage_id=profile.storage_id(), scoring_id=profile.scoring_id(), temperature=profile.teacher.temperature,
        training=profile.training.model_copy(update={"hostfile": hostfile and profile.resolve(hostfile)}),
        work=work,
        trust_remote_code=profile.models.trust_remote_code, threads=profile.threads,
    )  # fmt: skip
    began = time.monotonic()
    write_rows(lake, request, run.log)
    if not request.final.is_dir():
        _train(run, request)
    seconds = time.monotonic() - began
    metrics = pl.read_ndjson(request.steps_file)
    if metrics["step"].to_list() != list(range(len(steps))):
        raise TrainingError(
            f"{request.steps_file} does not hold the {len(steps)} steps of this training; delete {request.work} and "
            "materialise student_checkpoint again"
        )
    checkpoint = _place(request, checkpoints)
    writes = _writes(run, request, checkpoint, steps, metrics)
    commit = run.commit(ASSET, None, writes, inputs=inputs, data_version=checkpoint)
    shutil.rmtree(request.work)
    return report | _result(run, training_id, checkpoint, checkpoints, commit.snapshot, 1) | {"seconds": seconds}


def _made_before(run: Run, training_id: str, checkpoints: Path) -> str | None:
    """The checkpoint of this training, if the lake knows one and its folder is there."""
    rows = run.lake.sql("SELECT checkpoint_id FROM checkpoint_pairs WHERE training_id = ? LIMIT 1", [training_id])
    return next((c for c in rows["checkpoint_id"] if (checkpoints / c).is_dir()), None)


def _train(run: Run, request: Request) -> None:
    """Run the launcher to its end. Its output goes to `train.log`; our own lines go to the run's log, too."""
    work = request.work
    work.mkdir(parents=True, exist_ok=True)
    request.error_file.unlink(missing_ok=True)
    file = work / "request.json"
    file.touch(mode=0o600)  # a catalog's connection string may hold a password
    file.write_text(request.model_dump_json(indent=2))
    run.log(
        f"{ASSET}: starting {request.training.n_processes} rank(s); full log, until it succeeds: {work / 'train.log'}"
    )
    process = subprocess.Popen(
        _command(request, file), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", env=_environment(request),
    )  # fmt: skip
    try:
        with open(work / "train.log", "a") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.startswith(ASSET):
                    run.log(line.rstrip())
        process.wait()
    finally:
        _end(process, REMOTE_GRACE_SECONDS if request.training.hostfile else 0)
    if request.error_file.exists():
        raise TrainingError(json.loads(request.error_file.read_text())["error"])
    if not request.final.is_dir():  # the launcher also exits with 0 when it was killed
        tail = "".join((work / "train.log").read_text(errors="replace").splitlines(keepends=True)[-LOG_TAIL:])
        raise TrainingError(
            f"training ended with exit code {process.returncode} and no model; the last state is kept, so run again "
            f"after mending the cause. End of {work / 'train.log'}:\n{tail}"
        )


def _command(request: Request, file: Path) -> list[str]:
    with socket.socket() as s:  # a free port; taken by another process in between, the rendezvous fails and says so
        s.bind(("", 0))
        port = s.getsockname()[1]
    hostfile = request.training.hostfile
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile) if hostfile else os.devnull,
        "--num_accelerators", str(request.training.n_processes), "--master_port", str(port), "--no_local_rank",
        "--module", "nbg_core.training.train", "--request", str(file),
    ]  # fmt: skip


def _environment(request: Request) -> dict[str, str]:
    env = dict(os.environ)
    if request.threads:
        env["OMP_NUM_THREADS"] = str(max(1, request.threads // request.training.n_processes))
    if request.training.hostfile is None:
        env[TIED_TO_STDIN] = "1"
    return env


def _end(process: subprocess.Popen, grace: float) -> None:
    """No rank outlives this: on the normal way there is nothing left to end.

    Ranks on other machines are the launcher's to end, so it has `grace` seconds for it before it is killed."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    process.stdin.close()
    if family and grace:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
    for p in family:
        try:
            p.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


def _place(request: Request, checkpoints: Path) -> str:
    """Put the trained model among the checkpoints, under the hash of its content. It also stays where it is: until the
    commit, nothing else knows that this training is done."""
    checkpoint = ids.model_id(request.final)
    if not (checkpoints / checkpoint).is_dir():  # the same weights may come from other settings, too
        link_folder(request.final, checkpoints / checkpoint)
    return checkpoint


def _writes(run: Run, request: Request, checkpoint: str, steps: Plan, metrics: pl.DataFrame) -> list[Write]:
    rows = Rows(request.rows)
    row = {
        "checkpoint_id": checkpoint, "training_id": request.training_id, "path": checkpoint,
        "parent_model_id": request.policy_id, "teacher_model_id": request.teacher_id,
        "input_snapshot": request.snapshot, "n_pairs": rows.n_pairs, "n_steps": len(steps),
        "settings": json.dumps(run.settings(ASSET, None), sort_keys=True, default=str), "created_at": datetime.now(UTC),
    }  # fmt: skip
    training = pl.lit(request.training_id).alias("training_id")
    at_once = max(1, USES_AT_ONCE // request.training.global_batch_pairs)

    def used() -> Iterator[pl.DataFrame]:
        for i in range(0, len(steps), at_once):
            some = [steps[j] for j in range(i, min(i + at_once, len(steps)))]
            n = [len(step.pairs) for step in some]
            yield rows.names(np.concatenate([step.pairs for step in some])).with_columns(
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


def _result(run: Run, training_id: str, checkpoint: str, checkpoints: Path, snapshot: int, new_rows: int) -> dict:
    steps = run.lake.sql(
        "SELECT * EXCLUDE (training_id, materialisation_id) FROM training_steps WHERE training_id = ? ORDER BY step",
        [training_id],
    )
    return {
        "snapshot": snapshot, "data_version": checkpoint, "rows": 1, "new_rows": new_rows, "checkpoint_id": checkpoint,
        "path": str(checkpoints / checkpoint), "first": steps.row(0, named=True), "last": steps.row(-1, named=True),
        "tokens_per_second": steps["tokens_per_second"].median(),
    }  # fmt: skip
