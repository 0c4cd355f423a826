"""Materialise what is stale, from the command line, as ordinary Dagster runs: the UI shows them afterwards.

Runs go one after the other in this process; their steps still start workers of their own (assets.py).
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

import dagster as dg
from dagster import DagsterExecutionInterruptedError, DagsterRunStatus, RunsFilter

from nbg_assets.assets import progress as worker_lines
from nbg_assets.definitions import build
from nbg_assets.partitions import sync_partitions
from nbg_assets.stale import stale_slices, stale_student
from nbg_core.base.files import hold
from nbg_core.base.processes import process_is_there, process_mark
from nbg_core.config.profile import PROJECT_ROOT, Profile
from nbg_core.config.slices import find_slices
from nbg_core.lake.lake import Lake
from nbg_core.lineage.staleness import status
from nbg_core.vllm.environment import missing_environment

PROCESS_TAG = "nbg/process"
"""Host and process (`base.processes.process_mark`) of the command that holds a run, so that the next one can tell a run
that was killed."""
UNFINISHED = [
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
"""What a run can be in when its command is killed."""
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@dataclass(frozen=True)
class Result:
    """What became of one partition: `ran` is false for what was there already or could not start, `message` is why it
    did not succeed."""

    asset: str
    slice_name: str | None
    ran: bool
    success: bool = True
    message: str = ""
    checks_failed: int = 0
    """Checks of what it made that did not pass; a blocking one makes it a failure."""

    @property
    def name(self) -> str:
        return self.asset + (f"[{self.slice_name}]" if self.slice_name else "")


@contextmanager
def dagster_instance(profile: Profile) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance at DAGSTER_HOME; without one, at data/dagster_home, which is then set and made.

    Its dagster.yaml links to the project's."""
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(profile.resolve("data/dagster_home"))))
    home.mkdir(parents=True, exist_ok=True)
    for path in (home, *home.glob("*/*.db")):
        if not os.access(path, os.W_OK):
            raise PermissionError(f"Dagster's {path} cannot be written to")
    ours = home / "dagster.yaml"
    if ours.is_symlink() and ours.readlink() != PROJECT_ROOT / "dagster.yaml":  # the project was moved or copied
        ours.unlink()
    if not ours.exists():
        ours.symlink_to(PROJECT_ROOT / "dagster.yaml")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield instance


def materialise_stale(
    instance: dg.DagsterInstance,
    profile: Profile,
    slices: Sequence[str] | None = None,
    on_line: Callable[[str], None] = print,
) -> list[Result]:
    """Materialise what is missing or stale, slice by slice, then training and evaluation once every slice is fresh.

    `slices` limits the slices. Returns one result per partition that ran or was fresh; what could not start because
    of a failure is said on `on_line`. Training that is due and waits for a slice that is not fresh is a failure,
    unless `slices` was given. Raises LookupError for an unknown slice, ValueError for one whose name cannot be a
    partition and for a profile that needs vLLM where there is none, RuntimeError while another command is at it,
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
    with hold(lock, f"process {os.getpid()} on {socket.gethostname()}", "another `nbg run` is going on:"):
        if not good and not refused:
            raise ValueError(f"no query files in {profile.resolve(profile.paths.queries)}; put NAME.jsonl there")
        sync_partitions(instance, profile)
        _end_killed_runs(instance)
        for run in instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTED])):
            on_line(f"run {run.run_id} of {run.job_name} is going on; steps that load a model wait until it has none")
        return _materialise_stale(instance, profile, defs, lake, slices, good, on_line)


def _materialise_stale(instance, profile: Profile, defs, lake: Lake, slices, good: list[str], on_line) -> list[Result]:
    chosen = list(slices or good)
    states = status(lake, profile, chosen)
    results = [Result(s.asset, s.slice_name, ran=False) for s in states if s.slice_name and s.state == "fresh"]
    with _interrupts() as interrupted, _lines_to(on_line, interrupted):
        for slice_name, assets in stale_slices(states).items():
            results += _run(defs, instance, "refresh_slice", assets, slice_name, on_line, interrupted)
        states = status(lake, profile)
        waiting = stale_slices(states)
        due = stale_student(states)
        results += [Result(s.asset, None, ran=False) for s in states if s.slice_name is None and s.asset not in due]
        if due and waiting:
            why = f"not started: these slices are not fresh: {', '.join(waiting)}"
            on_line(f"{', '.join(due)} {why}")
            if slices is None:
                results += [Result(asset, None, ran=False, success=False, message=why) for asset in due]
        elif due:
            results += _run(defs, instance, "train", due, None, on_line, interrupted)
    return results


def _run(
    defs: dg.Definitions, instance, job: str, assets: list[str], slice_name: str | None, on_line, interrupted
) -> list[Result]:
    """One Dagster run of some assets of a job. Raises KeyboardInterrupt when it was interrupted."""
    where = f"[{slice_name}]" if slice_name else ""
    on_line(f"run {', '.join(assets)} {where}".rstrip())
    try:
        outcome = defs.resolve_job_def(job).execute_in_process(
            instance=instance,
            partition_key=slice_name,
            asset_selection=[dg.AssetKey(a) for a in assets],
            run_config=QUIET,
            tags={PROCESS_TAG: f"{socket.gethostname()}:{process_mark()}"},
            raise_on_error=False,
        )
    except DagsterExecutionInterruptedError:
        raise KeyboardInterrupt from None
    if interrupted() or _interrupted(instance, outcome):  # Dagster turns the signal into one more failed step
        raise KeyboardInterrupt
    events = outcome.get_asset_materialization_events()
    made = {e.asset_key.path[-1]: e.materialization.metadata for e in events if e.asset_key}
    failures = {e.step_key: _sentence(e) for e in outcome.all_events if e.is_step_failure}
    refused = [check for check in outcome.get_asset_check_evaluations() if not check.passed]
    results = []
    for asset in assets:
        n = sum(check.asset_key.path[-1] == asset for check in refused)
        if asset in failures:
            results.append(Result(asset, slice_name, ran=True, success=False, message=failures[asset], checks_failed=n))
        elif asset in made:
            results.append(Result(asset, slice_name, ran=not made[asset]["unchanged"].value, checks_failed=n))
        else:
            on_line(f"{asset}{where} not started: what it reads failed")
    for check in refused:
        on_line(f"check {check.asset_key.path[-1]}:{check.check_name} {where} {check.description}")
    if not outcome.success and not failures:
        raise RuntimeError(f"run {outcome.run_id} of {job}{where} failed outside its steps; see it in the Dagster UI")
    return results


def _interrupted(instance, outcome) -> bool:
    if instance.get_run_by_id(outcome.run_id).status in (DagsterRunStatus.CANCELED, DagsterRunStatus.CANCELING):
        return True
    errors = [e.step_failure_data.error for e in outcome.all_events if e.is_step_failure]
    return any("Interrupt" in (link.cls_name or "") for error in errors if error for link in _chain(error))


def _chain(error) -> Iterator:
    while error:
        yield error
        error = error.cause


def _sentence(event: dg.DagsterEvent) -> str:
    """Why a step failed: the description of its dagster.Failure, else the innermost error's message."""
    data = event.step_failure_data
    if data.user_failure_data:
        return data.user_failure_data.description or ""
    *_, innermost = _chain(data.error)
    return innermost.message.strip()


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come: also one whose exception was lost in a callback of some library, where Python
    cannot raise it, or that a library caught and logged."""
    seen: set[int] = set()
    if threading.current_thread() is not threading.main_thread():  # where no signal comes
        yield lambda: False
        return
    here, there = socket.socketpair()
    here.setblocking(False)
    there.setblocking(False)

    def came() -> bool:
        try:
            seen.update(here.recv(4096))
        except BlockingIOError:
            pass
        return bool(seen & {signal.SIGINT, signal.SIGTERM})

    def say_lost(lost) -> None:
        if not came():
            hook(lost)

    def is_no_loss(record: logging.LogRecord) -> bool:
        return not came()

    before, hook = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False), sys.unraisablehook
    sys.unraisablehook = say_lost
    last_resort = logging.lastResort or logging.NullHandler()  # prints the records of loggers without a handler
    last_resort.addFilter(is_no_loss)
    try:
        yield came
    finally:
        last_resort.removeFilter(is_no_loss)
        signal.set_wakeup_fd(before)
        sys.unraisablehook = hook
        here.close()
        there.close()


@contextmanager
def _lines_to(on_line: Callable[[str], None], interrupted: Callable[[], bool]) -> Iterator[None]:
    """Give every worker line to `on_line`, and keep Dagster's own loggers quiet. A line after an interrupt raises
    KeyboardInterrupt: it was lost."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if interrupted():
                raise KeyboardInterrupt
            on_line(record.getMessage())

    handler = Lines()
    worker_lines.addHandler(handler)
    try:
        yield
    finally:
        worker_lines.removeHandler(handler)


def _end_killed_runs(instance: dg.DagsterInstance) -> None:
    """Fail runs whose command was killed on this machine, and free their place in the pool: no daemon may be there."""
    for run in instance.get_runs(RunsFilter(statuses=UNFINISHED)):
        host, _, process = run.tags.get(PROCESS_TAG, "").partition(":")
        if host == socket.gethostname() and not process_is_there(process):
            instance.report_run_failed(run, "the command that ran this was killed")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
