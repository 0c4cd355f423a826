"""Run one stage in a worker process (nbg_core.runtime.worker); Dagster and the command line both go through it."""

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
    """A worker that reported an error or died; the message is its sentence, then the end of its log."""

    def __init__(self, error: str, tail: Sequence[str], log_path: Path):
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

    `profile` is a name or path as in NBG_PROFILE. The worker's output goes to `on_line` and to a log below
    `paths.work`; the traceback of an error that a user can mend goes to the log alone. Raises WorkerFailed, with the
    worker's own sentence, when it failed or died."""
    loaded = load_profile(profile)
    what = partition_name(asset, slice_name)
    check_run_id(run_id)
    log_path = loaded.resolve(loaded.paths.work) / "logs" / run_id / f"{what}.log"
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

    def each(line: str) -> None:
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
        code = run_process(command, env=env, on_line=each, log_path=log_path)
        report = json.loads(report_path.read_text()) if report_path.exists() else {}
    if "traceback" in report:
        with open(log_path, "a") as log:
            log.write(redact(report["traceback"]))
    if code == 0 and report and "error" not in report:
        return report
    raise WorkerFailed(redact(report.get("error") or f"the worker of {what} {_ending(code)}"), tail, log_path)


def _ending(code: int) -> str:
    code = -signal.SIGTERM if code == 128 + signal.SIGTERM else code  # what a worker makes of it
    if code >= 0:
        return f"ended with exit code {code} and no report"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + ("; the machine may have run out of memory" if name == "SIGKILL" else "")
