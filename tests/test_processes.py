"""Processes: lines, exit codes, and that nothing survives its caller (about 10 s)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from nbg_core.base.errors import redact
from nbg_core.runtime import run_worker as worker_runs
from nbg_core.runtime.run_worker import WorkerFailed, run_worker
from nbg_core.runtime.supervisor import run_process

PROFILE = (
    "name: p\nmodels: {student: s, teacher: t}\npaths: {work: %s}\nlake: {catalog: 'sqlite:%s/c', data_path: %s/f}\n"
)

TREE = """
    import os, signal, subprocess, sys, time
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if STUBBORN else ""
    exec(ignore)
    stay = [sys.executable, "-c", ignore + "import time; time.sleep(300)"]
    start_session = (
        "import subprocess, sys, time;"
        "print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid, flush=True); time.sleep(300)"
    )
    a = subprocess.Popen(stay)
    b = subprocess.Popen([sys.executable, "-c", start_session, *stay], stdout=subprocess.PIPE, text=True)
    print("pids", os.getpid(), a.pid, b.pid, b.stdout.readline().strip(), flush=True)
    time.sleep(300)
"""


def tree(stubborn: bool = False) -> list[str]:
    """A command with a child, a grandchild in a session of its own, and their pids on its first line."""
    return [sys.executable, "-c", f"STUBBORN = {stubborn}\n" + textwrap.dedent(TREE)]


def pids_of(line: str) -> list[int]:
    return [int(p) for p in line.split()[1:]]


def alive(pids: list[int]) -> list[int]:
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def gone_within(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)


def test_lines_of_both_streams_arrive_in_order_while_the_command_runs(tmp_path):
    script = (
        "import sys, time\n"
        "for i in range(3):\n"
        "    print('out', i, flush=True); print('err', i, file=sys.stderr, flush=True); time.sleep(0.3)"
    )
    seen = []
    code = run_process([sys.executable, "-c", script], on_line=lambda line: seen.append((time.monotonic(), line)),
                       log_path=tmp_path / "deep" / "log")  # fmt: skip
    lines = [line for _, line in seen]
    assert code == 0
    assert lines == ["out 0", "err 0", "out 1", "err 1", "out 2", "err 2"]
    assert seen[-1][0] - seen[0][0] > 0.4, "lines must stream, not arrive at the end"
    assert (tmp_path / "deep" / "log").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9), ("kill -SEGV $$", -signal.SIGSEGV)]
)
def test_exit_code_is_the_commands(script, code):
    assert run_process(["bash", "-c", script], on_line=lambda _: None) == code


def test_a_command_that_does_not_exist_says_so():
    lines = []
    assert run_process(["no-such-command"], on_line=lines.append) == 127
    assert "no-such-command cannot be started" in lines[0]


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_exception_ends_the_whole_tree_and_is_raised_on(stubborn):
    pids = []

    def on_line(line):
        pids.extend(pids_of(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_process(tree(stubborn), on_line=on_line, grace=1.0)
    assert len(pids) == 4
    assert not alive(pids)


def test_a_signal_to_the_caller_ends_the_tree(tmp_path):
    caller, pids = start_caller()
    caller.send_signal(signal.SIGINT)  # raises KeyboardInterrupt in the caller while it waits for a line
    assert caller.wait(15) != 0
    assert gone_within(pids, 0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="a session of its own is only followed on Linux")
def test_sigkill_of_the_caller_ends_the_tree():
    caller, pids = start_caller()
    caller.kill()
    caller.wait()
    assert gone_within(pids, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_sigkill_of_the_supervisor_ends_the_command_and_is_reported():
    pids = []

    def on_line(line):
        pids.extend(pids_of(line))
        psutil.Process(pids[0]).parent().kill()

    code = run_process(["bash", "-c", "sleep 300 & echo pids $$ $!; wait"], on_line=on_line, grace=1.0)
    assert code == -signal.SIGKILL and len(pids) == 2
    assert gone_within(pids, 5)


def test_an_exception_after_the_supervisor_was_killed_ends_the_group():
    pids = []

    def on_line(line):
        if not pids:
            pids.extend(pids_of(line))
            supervisor = psutil.Process(pids[0]).parent()
            supervisor.kill()
            assert gone_within([supervisor.pid], 5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_process(["bash", "-c", "sleep 300 & echo pids $$ $!; wait"], on_line=on_line, grace=1.0)
    assert len(pids) == 2 and gone_within(pids, 5)


def start_caller() -> tuple[subprocess.Popen, list[int]]:
    """A process that sits in run_process over `tree()`, and the pids of that tree and its supervisor."""
    script = (
        "import signal\nfrom nbg_core.runtime.supervisor import run_process\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs have it ignored
        f"run_process({tree()!r}, on_line=lambda s: print(s, flush=True))"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    pids = pids_of(caller.stdout.readline())
    supervisor = psutil.Process(caller.pid).children()[0].pid
    assert len(alive([*pids, supervisor])) == 5
    return caller, [*pids, supervisor]


def test_children_left_behind_by_a_command_that_ends_are_ended():
    lines = []
    start = time.monotonic()
    code = run_process(["bash", "-c", "setsid sleep 300 & echo pids $!; exit 4"], on_line=lines.append)
    assert code == 4
    assert time.monotonic() - start < 5
    assert not alive(pids_of(lines[0]))


@pytest.fixture
def profile(tmp_path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(PROFILE % (tmp_path / "work", tmp_path, tmp_path))
    return path


def test_run_worker_passes_on_the_workers_own_sentence(profile, tmp_path):
    lines = []
    with pytest.raises(WorkerFailed, match="no model at") as e:
        run_worker("queries", "addition", "r1", profile=profile, on_line=lines.append)
    assert e.value.log_path == tmp_path / "work" / "logs" / "r1" / "queries[addition].log"
    log = e.value.log_path.read_text().splitlines()
    assert log[: len(lines)] == lines and not any("Traceback" in line for line in lines)
    assert log[len(lines)] == "Traceback (most recent call last):" and log[-1].startswith("FileNotFoundError: no model")


def test_run_worker_says_which_signal_ended_the_worker_and_where_the_log_is(profile, monkeypatch):
    def die(command, *, on_line, log_path, **_):
        on_line("loading weights")
        return -signal.SIGKILL

    monkeypatch.setattr(worker_runs, "run_process", die)
    with pytest.raises(WorkerFailed, match=r"worker of teacher_logits\[a\] was ended by SIGKILL.*memory") as e:
        run_worker("teacher_logits", "a", "r1", profile=profile, on_line=lambda _: None)
    assert "teacher_logits[a].log:\nloading weights" in str(e.value)


def test_secrets_are_blanked(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    assert redact("got hf_abcdefgh") == "got ***"
    assert redact("postgres:dbname=x password=s3cret host=h") == "postgres:dbname=x password=*** host=h"
    assert redact("postgres:dbname=x password='two words' host=h") == "postgres:dbname=x password=*** host=h"
    assert redact("postgresql://me:s3cret@db/x") == "postgresql://me:***@db/x"
    assert redact("http://db:5432/x") == "http://db:5432/x"
    monkeypatch.setenv("PGPASSWORD", "8letters")
    monkeypatch.setenv("SHORT_SECRET", "7letter")  # shorter ones occur in text by chance
    assert redact("8letters and 7letter") == "*** and 7letter"
    lines = []
    run_process(["bash", "-c", "echo $HF_TOKEN"], on_line=lines.append, env={**os.environ})
    assert lines == ["***"]
