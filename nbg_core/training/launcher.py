"""The deepspeed launcher as a child process of the worker: its command, its environment, its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from nbg_core.base.errors import redact
from nbg_core.base.processes import free_port
from nbg_core.lineage.run import Run
from nbg_core.training.request import ASSET, TIED_TO_STDIN, TrainingError, TrainingRequest

LOG_TAIL = 20
"""Lines from the end of the log that an error shows."""

REMOTE_GRACE_SECONDS = 5.0
"""Seconds that a launcher with ranks on other machines has to end them, before it is killed."""


def launch(run: Run, request: TrainingRequest) -> None:
    """Run the launcher to its end. Its output goes to `train.log`; the lines of `train` also go to the run's log."""
    work = request.work
    work.mkdir(parents=True, exist_ok=True)
    request.error_file.unlink(missing_ok=True)
    file = work / "request.json"
    file.touch(mode=0o600)  # a catalog's connection string may hold a password
    file.write_text(request.model_dump_json(indent=2))
    run.log(
        f"{ASSET}: starting {request.training.n_processes} rank(s); log (deleted with the commit): {work / 'train.log'}"
    )
    process = subprocess.Popen(
        _command(request, file), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", env=_environment(request),
    )  # fmt: skip
    assert process.stdout is not None  # a pipe
    try:
        with open(work / "train.log", "a") as log:
            for line in process.stdout:
                log.write(redact(line))
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
            f"training ended with exit code {process.returncode} and no model; the last state is kept, so correct the "
            f"cause and run again. End of {work / 'train.log'}:\n{tail}"
        )


def _command(request: TrainingRequest, file: Path) -> list[str]:
    port = free_port("")
    hostfile = request.training.hostfile
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile) if hostfile else os.devnull,
        "--num_accelerators", str(request.training.n_processes), "--master_port", str(port), "--no_local_rank",
        "--module", "nbg_core.training.train", "--request", str(file),
    ]  # fmt: skip


def _environment(request: TrainingRequest) -> dict[str, str]:
    env = dict(os.environ)
    if request.threads:
        env["OMP_NUM_THREADS"] = str(max(1, request.threads // request.training.n_processes))
    if request.training.hostfile is None:
        env[TIED_TO_STDIN] = "1"
    return env


def _end(process: subprocess.Popen, grace: float) -> None:
    """End the launcher and its ranks; after a training that ended by itself there are none left.

    Only the launcher can end ranks on other machines: it has `grace` seconds for that before it is killed."""
    family: list[subprocess.Popen | psutil.Process]
    family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    assert process.stdin is not None  # a pipe
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
