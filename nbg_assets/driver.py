"""Materialise what is stale from the command line, as ordinary Dagster runs, which the UI shows afterwards.

The runs are executed one after the other in this process. Their steps start worker processes, as always (assets.py).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from dagster import DagsterExecutionInterruptedError, DagsterRunStatus, RunsFilter

from nbg_assets.assets import worker_log
from nbg_assets.definitions import build
from nbg_assets.partitions import sync_partitions
from nbg_assets.stale import stale_slices, stale_student
from nbg_core.base.files import hold
from nbg_core.base.processes import process_is_running, process_key
from nbg_core.config.profile import PROJECT_ROOT, Profile
from nbg_core.config.slices import find_slices
from nbg_core.lake.lake import Lake
from nbg_core.lineage.staleness import status
from nbg_core.vllm.environment import missing_environment

if TYPE_CHECKING:
    from dagster._utils.error import SerializableErrorInfo  # has no public name

PROCESS_TAG = "nbg/process"
"""Host and process (`base.processes.process_key`) of the command that holds a run, so that the next one can tell a run
that was killed."""
LEFT_BY_A_KILL = [
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
"""Statuses in which a killed command can leave its run. QUEUED is none of them: these runs are executed at once."""
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
"""Run configuration that keeps Dagster's own log lines off the terminal."""


@dataclass(frozen=True)
class Result:
    """The outcome for one partition."""

    asset: str
    slice_name: str | None
    ran: bool
    """False for a partition that was there already, or that could not be started."""
    success: bool = True
    message: str = ""
    """Why it did not succeed."""
    checks_failed: int = 0
    """Checks that did not pass. If one of them is blocking, `success` is False."""

    @property
    def name(self) -> str:
        return self.asset + (f"[{self.slice_name}]" if self.slice_name else "")


@contextmanager
def dagster_instance(profile: Profile) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance in the folder DAGSTER_HOME; if the variable is not set, it is set to data/dagster_home.

    The folder is created when it does not exist, with a link to the project's dagster.yaml. Raises PermissionError when
    it cannot be written to."""
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(profile.resolve("data/dagster_home"))))
    home.mkdir(parents=True, exist_ok=True)
    for path in (home, *home.glob("*/*.db")):
        if not os.access(path, os.W_OK):
            raise PermissionError(f"Dagster's {path} cannot be written to")
    config = home / "dagster.yaml"
    if config.is_symlink() and config.readlink() != PROJECT_ROOT / "dagster.yaml":  # the project was moved or copied
        config.unlink()
    if not config.exists():
        config.symlink_to(PROJECT_ROOT / "dagster.yaml")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield instance


def materialise_stale(
    instance: dg.DagsterInstance,
    profile: Profile,
    slices: Sequence[str] | None = None,
    on_line: Callable[[str], None] = print,
) -> list[Result]:
    """Materialise what is missing or stale: each slice in turn, then training and evaluation if every slice is fresh.

    `slices` limits the slices. Progress goes to `on_line`, including the partitions that were not started because one
    that they read has failed. Returns a result for each partition that was run or was fresh already. When training is
    due but a slice is not fresh, the results say that training failed, unless `slices` was given.

    Raises LookupError for an unknown slice, ValueError for a slice name that cannot be a partition, without any query
    file, and when the profile needs vLLM and it is not installed, RuntimeError while another `nbg run` is running, and
    KeyboardInterrupt when a run was interrupted."""
    if problem := missing_environment(profile):
        raise ValueError(problem)
    defs, lake = build(), Lake.of(profile)
    good, refused = find_slices(profile)
    for name in slices or ():
        if name in refused:
            raise ValueError(refused[name])
        if name not in good:
            raise LookupError(f"no slice {name!r}; slices: {', '.join(good) or 'none'}")
    for reason in refused.values():
        on_line(f"left out: {reason}")
    lock = profile.resolve(profile.paths.work) / "locks" / "nbg run.lock"
    with hold(lock, f"process {os.getpid()} on {socket.gethostname()}", "another `nbg run` is in progress:"):
        if not good and not refused:
            raise ValueError(f"no query files in {profile.resolve(profile.paths.queries)}; put NAME.jsonl there")
        sync_partitions(instance, profile)
        _end_killed_runs(instance)
        for run in instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTED])):
            on_line(
                f"run {run.run_id} of job {run.job_name} is in progress; steps that load a model wait while it runs one"
            )
        return _materialise_stale(instance, profile, defs, lake, slices, good, on_line)


def _materialise_stale(
    instance: dg.DagsterInstance,
    profile: Profile,
    defs: dg.Definitions,
    lake: Lake,
    slices: Sequence[str] | None,
    good: list[str],
    on_line: Callable[[str], None],
) -> list[Result]:
    """`materialise_stale`, once its arguments are checked and the lock is held. `good`: all slices that can be used."""
    chosen = list(slices or good)
    states = status(lake, profile, chosen)
    results = [Result(s.asset, s.slice_name, ran=False) for s in states if s.slice_name and s.state == "fresh"]
    with interrupts() as interrupted, worker_lines_to(on_line, interrupted):
        for slice_name, assets in stale_slices(states).items():
            results += _run(defs, instance, "refresh_slice", assets, slice_name, on_line, interrupted)
        states = status(lake, profile)
        waiting = stale_slices(states)
        due = stale_student(states)
        results += [Result(s.asset, None, ran=False) for s in states if s.slice_name is None and s.asset not in due]
        if due and waiting:
            reason = f"not started: training needs every slice, and these are not fresh: {', '.join(waiting)}"
            on_line(f"{', '.join(due)} {reason}")
            if slices is None:
                results += [Result(asset, None, ran=False, success=False, message=reason) for asset in due]
        elif due:
            results += _run(defs, instance, "train", due, None, on_line, interrupted)
    return results


def _run(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    job: str,
    assets: list[str],
    slice_name: str | None,
    on_line: Callable[[str], None],
    interrupted: Callable[[], bool],
) -> list[Result]:
    """Execute one Dagster run of some `assets` of a job, and return their results. Raises KeyboardInterrupt when it was
    interrupted."""
    where = f"[{slice_name}]" if slice_name else ""
    on_line(f"run {', '.join(assets)} {where}".rstrip())
    try:
        outcome = defs.resolve_job_def(job).execute_in_process(
            instance=instance,
            partition_key=slice_name,
            asset_selection=[dg.AssetKey(a) for a in assets],
            run_config=QUIET,
            tags={PROCESS_TAG: f"{socket.gethostname()}:{process_key()}"},
            raise_on_error=False,
        )
    except DagsterExecutionInterruptedError:
        raise KeyboardInterrupt from None
    if interrupted() or _was_interrupted(instance, outcome):  # Dagster may report the signal as a failed step
        raise KeyboardInterrupt
    events = outcome.get_asset_materialization_events()
    made = {e.asset_key.path[-1]: e.materialization.metadata for e in events if e.asset_key}
    failures = {e.step_key: failure_message(e) for e in outcome.all_events if e.is_step_failure}
    not_passed = [check for check in outcome.get_asset_check_evaluations() if not check.passed]
    results = []
    for asset in assets:
        n = sum(check.asset_key.path[-1] == asset for check in not_passed)
        if asset in failures:
            results.append(Result(asset, slice_name, ran=True, success=False, message=failures[asset], checks_failed=n))
        elif asset in made:
            results.append(Result(asset, slice_name, ran=not made[asset]["unchanged"].value, checks_failed=n))
        else:
            on_line(f"{asset}{where} not started: what it reads failed")
    for check in not_passed:
        on_line(f"check {check.asset_key.path[-1]}:{check.check_name} {where} {check.description}")
    if not outcome.success and not failures:
        raise RuntimeError(f"run {outcome.run_id} of {job}{where} failed outside its steps; see it in the Dagster UI")
    return results


def _was_interrupted(instance: dg.DagsterInstance, outcome: dg.ExecuteInProcessResult) -> bool:
    run = instance.get_run_by_id(outcome.run_id)
    if run is not None and run.status in (DagsterRunStatus.CANCELED, DagsterRunStatus.CANCELING):
        return True
    errors = [e.step_failure_data.error for e in outcome.all_events if e.is_step_failure]
    return any("Interrupt" in (cause.cls_name or "") for error in errors for cause in _causes(error))


def _causes(error: SerializableErrorInfo | None) -> Iterator[SerializableErrorInfo]:
    """An error, its cause, the cause of that, ..."""
    while error:
        yield error
        error = error.cause


def failure_message(event: dg.DagsterEvent) -> str:
    """Why a step failed: the description of its dagster.Failure, else the message of the innermost error."""
    data = event.step_failure_data
    if data.user_failure_data:
        return data.user_failure_data.description or ""
    *_, innermost = _causes(data.error)
    return innermost.message.strip()


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGINT or SIGTERM has arrived since the `with` block began.

    It also finds a signal whose KeyboardInterrupt was lost: raised in a callback of a library, from where Python cannot
    pass it on, or caught and logged by a library. What Python and `logging` would print of the lost exception is not
    printed. In a thread other than the main one, which receives no signals, the function always returns False."""
    received: set[int] = set()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    reader, writer = socket.socketpair()  # Python writes the number of each signal into `writer`
    reader.setblocking(False)
    writer.setblocking(False)

    def interrupted() -> bool:
        try:
            received.update(reader.recv(4096))
        except BlockingIOError:
            pass
        return bool(received & {signal.SIGINT, signal.SIGTERM})

    def on_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
        if not interrupted():
            old_hook(unraisable)

    def is_printed(record: logging.LogRecord) -> bool:
        return not interrupted()

    old_fd, old_hook = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False), sys.unraisablehook
    sys.unraisablehook = on_unraisable
    last_resort = logging.lastResort or logging.NullHandler()  # prints the records of loggers without a handler
    last_resort.addFilter(is_printed)
    try:
        yield interrupted
    finally:
        last_resort.removeFilter(is_printed)
        signal.set_wakeup_fd(old_fd)
        sys.unraisablehook = old_hook
        reader.close()
        writer.close()


@contextmanager
def worker_lines_to(on_line: Callable[[str], None], interrupted: Callable[[], bool]) -> Iterator[None]:
    """Pass every line that a worker prints to `on_line`.

    A line that arrives after an interrupt shows that the interrupt was lost; it raises KeyboardInterrupt instead."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if interrupted():
                raise KeyboardInterrupt
            on_line(record.getMessage())

    handler = Lines()
    worker_log.addHandler(handler)
    try:
        yield
    finally:
        worker_log.removeHandler(handler)


def _end_killed_runs(instance: dg.DagsterInstance) -> None:
    """Fail runs whose command was killed on this machine, and free their slots in the pool; there may be no daemon."""
    for run in instance.get_runs(RunsFilter(statuses=LEFT_BY_A_KILL)):
        host, _, process = run.tags.get(PROCESS_TAG, "").partition(":")
        if host == socket.gethostname() and not process_is_running(process):
            instance.report_run_failed(run, "the command that ran this was killed")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
