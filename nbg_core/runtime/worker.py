"""The process that a stage runs in: `python -m nbg_core.runtime.worker ASSET [--slice S] [--run-id R] [--report FILE]`.

It prints progress, writes one JSON report (the stage's report, or the error in one sentence) and exits with 0 or 1.
SIGTERM ends it as an error would: finished work is committed first. A lock keeps a second worker from the same
partition. The operating system releases it when the process ends, however that happens.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from nbg_core.assets import BY_NAME, get, partition_name
from nbg_core.base.errors import is_defect, user_message
from nbg_core.base.files import hold, write_json
from nbg_core.base.names import check_run_id
from nbg_core.config.load import load_profile
from nbg_core.config.profile import Profile
from nbg_core.lake.lake import Lake
from nbg_core.lineage.run import Run


@contextmanager
def only_worker(profile: Profile, asset: str, slice_name: str | None, run_id: str):
    """Hold the lock of a partition. Raises RuntimeError when another run holds it, and names that run."""
    name = partition_name(asset, slice_name)
    lock = profile.resolve(profile.paths.work) / "locks" / f"{name}.lock"
    with hold(lock, f"run {run_id}, process {os.getpid()}", f"{name} is being materialised by"):
        yield


def materialise(asset: str, slice_name: str | None, run_id: str = "local", profile: Profile | None = None) -> dict:
    """Materialise one partition in this process and return its report.

    Raises ValueError for an unknown asset, and for names that cannot be those of a slice or a run."""
    partition_name(asset, slice_name)
    check_run_id(run_id)
    profile = profile or load_profile()
    with only_worker(profile, asset, slice_name, run_id):
        run = Run(profile, Lake.of(profile), run_id, log=lambda line: print(line, flush=True))
        return asdict(importlib.import_module(get(asset).stage).materialise(run, slice_name))


def _terminate(number: int, _frame) -> None:
    """Handler of SIGTERM: end as by an exception, so that finished work is committed."""
    signal.signal(number, signal.SIG_IGN)  # a second SIGTERM must not interrupt the commit of finished work
    raise SystemExit(128 + number)


def main() -> int:
    signal.signal(signal.SIGTERM, _terminate)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("asset", choices=BY_NAME)
    parser.add_argument("--slice")
    parser.add_argument("--run-id", default="local")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    try:
        report = materialise(args.asset, args.slice, args.run_id)
    except Exception as e:  # the report gives the error in one sentence, the log its traceback
        report = {"error": user_message(e), "error_type": type(e).__name__}
        if is_defect(e) or not args.report:
            traceback.print_exc()
        else:
            report["traceback"] = traceback.format_exc()
    if args.report:
        write_json(args.report, report)
    else:
        print(json.dumps(report, indent=2, default=str))
    return 1 if "error" in report else 0


if __name__ == "__main__":
    sys.exit(main())
