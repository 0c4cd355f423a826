"""Whether a process still runs: a later one that has its pid is another."""

from __future__ import annotations

import subprocess
import sys
import time

import dagster as dg
import psutil
import pytest
from fake_worker import write_profile

from nbg_assets import driver
from nbg_assets.definitions import build
from nbg_core.base import processes
from nbg_core.base.processes import process_is_running, process_key
from nbg_core.config.load import load_profile


def mark_in(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def test_a_mark_is_of_one_process_as_long_as_it_runs():
    other = mark_in("from nbg_core.base.processes import process_key; print(process_key(), flush=True); input()")
    mark = other.stdout.readline().strip()
    assert mark.partition(":")[0] == str(other.pid)
    assert process_is_running(mark)
    other.kill()
    time.sleep(0.2)
    assert not process_is_running(mark), "it waits to be collected, and does not run"
    other.wait()
    assert not process_is_running(mark)


def test_a_later_process_with_the_same_pid_is_another(monkeypatch):
    mark = process_key()
    pid, _, seconds = mark.partition(":")
    assert process_is_running(mark)
    assert not process_is_running(f"{pid}:{float(seconds) - 60:.2f}"), "the pid came again a minute later"
    assert process_is_running(pid), "an older mark is of the pid alone"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the two move apart with the clock")
def test_a_clock_that_is_set_makes_no_process_another(monkeypatch):
    mark, real, boot = process_key(), psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 7200)
    monkeypatch.setattr(processes.psutil, "boot_time", lambda: boot() + 7200)
    assert process_is_running(mark)


def test_runs_of_a_killed_command_are_ended_though_its_pid_is_in_use(tmp_path, monkeypatch):
    monkeypatch.setenv("NBG_PROFILE", str(write_profile(tmp_path / "p")))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    job, host, mine = build().resolve_job_def("train"), driver.socket.gethostname(), process_key()
    pid, _, seconds = mine.partition(":")
    killed, gone = dg.DagsterRunStatus.FAILURE, f"{pid}:{float(seconds) - 3600:.2f}"
    cases = {
        f"{host}:{mine}": None, f"{host}:{gone}": killed, f"{host}:{pid}": None, f"{host}:{2**22 + 1}": killed,
        f"elsewhere:{gone}": None,
    }  # fmt: skip
    started = [dg.DagsterRunStatus.STARTED]
    with driver.dagster_instance(load_profile()) as instance:
        runs = {
            (tag, status): instance.create_run_for_job(job, tags={driver.PROCESS_TAG: tag}, status=status)
            for tag in cases
            for status in (driver.LEFT_BY_A_KILL if tag == f"{host}:{gone}" else started)
        }
        untagged = instance.create_run_for_job(job)
        driver._end_killed_runs(instance)
        for (tag, status), run in runs.items():
            assert instance.get_run_by_id(run.run_id).status == (cases[tag] or status), (tag, status)
        assert instance.get_run_by_id(untagged.run_id).status == dg.DagsterRunStatus.NOT_STARTED
