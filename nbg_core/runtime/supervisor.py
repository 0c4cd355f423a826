"""Run a command so that nothing of it outlives the caller.

`run_process` starts `python -m nbg_core.runtime.supervisor -- COMMAND`: a supervisor in a session of its own that runs the
command and collects its orphans. The whole tree ends when the command ends, when the caller raises (an interrupt, a
Dagster termination), and when the caller disappears, even by SIGKILL: on Linux the kernel tells the supervisor
(PR_SET_PDEATHSIG) and hands it every orphaned descendant (PR_SET_CHILD_SUBREAPER), also those that opened a session
of their own; elsewhere the supervisor looks at its parent twice a second. Ending is SIGTERM, a grace, SIGKILL. When
the supervisor itself is killed, the command goes with it (Linux), and then the rest of its process group.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from nbg_core.base.errors import redact
from nbg_core.base.processes import GRACE_SECONDS, adopt_orphans, die_with_parent, is_alive

_POLL_SECONDS = 0.05


def run_process(
    command: Sequence[str],
    *,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log_path: Path | None = None,
    grace: float = GRACE_SECONDS,
) -> int:
    """Run `command`, give each line of its output (both streams, in order, secrets blanked) to `on_line` and append it
    to `log_path`, and return its exit code: -N when signal N ended it.

    If anything is raised meanwhile, by `on_line` or into this thread, the command's whole tree is ended first."""
    supervisor = [sys.executable, "-m", "nbg_core.runtime.supervisor", str(os.getpid()), str(grace), "--", *command]
    process = subprocess.Popen(
        supervisor, env=_importable(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1, start_new_session=True,
    )  # fmt: skip
    # What a killed supervisor leaves behind still holds our end of its output: reading on would wait for it.
    assert process.stdout is not None  # a pipe
    watch = threading.Thread(target=_end_what_a_killed_one_left, args=[process], daemon=True)
    watch.start()
    try:
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path or os.devnull, "a", buffering=1) as log:
            for line in process.stdout:
                line = redact(line.rstrip("\n"))
                log.write(line + "\n")
                on_line(line)
        watch.join()
        return process.wait()
    except BaseException:
        _end_supervisor(process, grace)
        raise
    finally:
        process.stdout.close()


def _importable(env: Mapping[str, str] | None) -> dict[str, str]:
    """`env` with this package importable wherever the command runs."""
    env = dict(os.environ if env is None else env)
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    return env


def _end_supervisor(process: subprocess.Popen, grace: float) -> None:
    """Ask the supervisor to end its tree; end its group ourselves if it does not, or if we are interrupted again."""
    try:
        process.terminate()
        process.wait(grace + 2)
    except BaseException:  # also a second interrupt: nothing may survive it, and the first one is raised on
        pass
    finally:
        _kill_group(process.pid)
        process.wait()


def _end_what_a_killed_one_left(supervisor: subprocess.Popen) -> None:
    if supervisor.wait() == -signal.SIGKILL:  # the command's end, or the supervisor's own
        _kill_group(supervisor.pid)


def _kill_group(group: int) -> None:
    """End what a supervisor that was killed itself has left in its group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left
        pass


def supervise(command: Sequence[str], parent: int, grace: float) -> int:
    """Run `command` until it ends, `parent` is gone or a signal comes; end what is left of the tree.

    Returns the exit code, -N for signal N, 127 for a command that does not start."""
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda n, _frame: stop.append(n))
    die_with_parent(signal.SIGTERM)
    adopt_orphans()
    try:
        main = subprocess.Popen(command, preexec_fn=die_with_parent)
    except OSError as e:
        print(f"{command[0]} cannot be started: {e}", flush=True)
        return 127
    while main.poll() is None and not stop and os.getppid() == parent:
        _reap_orphans(main.pid)
        time.sleep(_POLL_SECONDS)
    deadline = time.monotonic() + grace
    if left := _living():
        _signal_all(signal.SIGTERM)
    while left:
        if time.monotonic() > deadline:
            _signal_all(signal.SIGKILL)
        main.poll()
        _reap_orphans(main.pid)
        time.sleep(_POLL_SECONDS)
        left = _living()
    return main.wait()


def _living() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if is_alive(p)]


def _signal_all(number: int) -> None:
    for process in _living():
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def _reap_orphans(main: int) -> None:
    """Collect ended descendants that were handed to us (Linux); `main` is left to its Popen."""
    if sys.platform != "linux":
        return
    try:
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != main:
            os.waitpid(ended.si_pid, 0)
    except ChildProcessError:  # none left
        pass


def main() -> None:
    parent, grace, _, *command = sys.argv[1:]
    code = supervise(command, int(parent), float(grace))
    if code < 0:  # end as the command did, so that the caller sees the signal
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
