"""Start a worker process (`runtime.worker`) for one partition and wait for its report. Dagster's steps call this."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from nbg_core.assets import partition_name
from nbg_core.base.errors import redact
from nbg_core.base.names import check_run_id
from nbg_core.config.load import load_profile
from nbg_core.runtime.supervisor import run_process


class WorkerFailed(RuntimeError):
    """A worker reported an error or died. The message is its error, then the end of its log."""

    def __init__(self, error: str, tail: Sequence[str], log_path: Path):
        """`error`: one sentence. `tail`: the last lines of the worker's output."""
        self.error, self.tail, self.log_path = error, list(tail), log_path
        super().__init__(f"{error}\n\nend of {log_path}:\n" + "\n".join(tail))


def run_worker(
    asset: str,
    slice_name: str | None,
    run_id: str,
    *,
    profile: str | Path | None = None,
    on_line: Callable[[str], None] = print,
) -> dict:
    """Materialise one partition in a worker process and return its report.

    `profile` is a name or path as in NBG_PROFILE. Each line of the worker's output goes to `on_line` and to a log file
    below `paths.work`. The traceback of an error that a user can correct is written to the log file only. Raises
    WorkerFailed with the worker's error when it failed or died, and ValueError for an unknown asset and for names that
    cannot be those of a slice or a run."""
    loaded = load_profile(profile)
    partition = partition_name(asset, slice_name)
    check_run_id(run_id)
    log_path = loaded.resolve(loaded.paths.work) / "logs" / run_id / f"{partition}.log"
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if profile:
        env["NBG_PROFILE"] = str(profile)
    tail: deque[str] = deque(maxlen=20)

    def on_output(line: str) -> None:
        tail.append(line)
        on_line(line)

    with tempfile.TemporaryDirectory(prefix="nbg-report-") as folder:
        report_path = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "nbg_core.runtime.worker",
            asset,
            "--run-id",
            run_id,
            "--report",
            str(report_path),
        ]
        if slice_name is not None:
            command += ["--slice", slice_name]
        code = run_process(command, env=env, on_line=on_output, log_path=log_path)
        report = json.loads(report_path.read_text()) if report_path.exists() else {}
    if "traceback" in report:
        with open(log_path, "a") as log:
            log.write(redact(report["traceback"]))
    if code == 0 and report and "error" not in report:
        return report
    raise WorkerFailed(
        redact(report.get("error") or f"the worker of {partition} {_how_it_ended(code)}"), tail, log_path
    )


def _how_it_ended(code: int) -> str:
    """How a worker without a report ended, from the exit code of `run_process`."""
    if code == 128 + signal.SIGTERM:  # a worker turns SIGTERM into this exit code
        code = -signal.SIGTERM
    if code >= 0:
        return f"ended with exit code {code} and no report"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + ("; the machine may have run out of memory" if name == "SIGKILL" else "")
