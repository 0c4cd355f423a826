"""Run a command so that none of its processes outlives the caller.

`run_process` starts `python -m nbg_core.runtime.supervisor PARENT_PID GRACE -- COMMAND`. The supervisor is a process in
a session of its own; it runs the command and reaps its orphaned descendants. The whole process tree is ended when

- the command ends,
- an exception is raised in the caller: an interrupt, or a Dagster termination,
- the caller is gone, even by SIGKILL. On Linux the kernel signals this to the supervisor (PR_SET_PDEATHSIG); elsewhere
  the supervisor compares its parent's pid 20 times a second.

On Linux every orphaned descendant becomes a child of the supervisor (PR_SET_CHILD_SUBREAPER), including one that opened
a session of its own. To end the tree, the supervisor sends SIGTERM and, after a grace period, SIGKILL. When the
supervisor itself is killed, the kernel kills the command (Linux) and the caller kills the rest of its process group.
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
    """Run `command` and return its exit code: -N when signal N ended it.

    Each line of its output is passed to `on_line` and appended to `log_path`: stdout and stderr in one stream, with
    secrets replaced. `grace`: seconds between SIGTERM and SIGKILL. When `on_line` raises, or an exception reaches this
    thread from elsewhere, the command's whole process tree is ended before the exception goes on."""
    supervisor = [sys.executable, "-m", "nbg_core.runtime.supervisor", str(os.getpid()), str(grace), "--", *command]
    process = subprocess.Popen(
        supervisor, env=_importable(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None  # a pipe
    # Processes that a killed supervisor leaves behind keep the pipe open, and the loop below would wait for them.
    watch = threading.Thread(target=_kill_group_of_killed_supervisor, args=[process], daemon=True)
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
    """`env`, with PYTHONPATH such that this package can be imported in any working directory."""
    env = dict(os.environ if env is None else env)
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    return env


def _end_supervisor(process: subprocess.Popen, grace: float) -> None:
    """Have the supervisor end its tree. If it does not, or this thread is interrupted again, kill its process group."""
    try:
        process.terminate()
        process.wait(grace + 2)
    except BaseException:  # such as a second interrupt; the caller goes on raising the first one
        pass
    finally:
        _kill_group(process.pid)
        process.wait()


def _kill_group_of_killed_supervisor(supervisor: subprocess.Popen) -> None:
    # The supervisor also ends by SIGKILL when its command did; then the group is empty.
    if supervisor.wait() == -signal.SIGKILL:
        _kill_group(supervisor.pid)


def _kill_group(group: int) -> None:
    """Send SIGKILL to all processes of a group, if there are any."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def supervise(command: Sequence[str], parent: int, grace: float) -> int:
    """Run `command` until it ends, the process with pid `parent` is gone or a signal arrives; then end the whole tree.

    Returns the exit code: -N when signal N ended the command, 127 when it cannot be started."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda n, _frame: received.append(n))
    adopt_orphans()
    try:
        main = subprocess.Popen(command, preexec_fn=die_with_parent)
    except OSError as e:
        print(f"{command[0]} cannot be started: {e}", flush=True)
        return 127
    while main.poll() is None and not received and os.getppid() == parent:
        _reap_orphans(main.pid)
        time.sleep(_POLL_SECONDS)
    deadline = time.monotonic() + grace
    if running := _descendants():
        _signal_all(signal.SIGTERM)
    while running:
        if time.monotonic() > deadline:
            _signal_all(signal.SIGKILL)
        main.poll()
        _reap_orphans(main.pid)
        time.sleep(_POLL_SECONDS)
        running = _descendants()
    return main.wait()


def _descendants() -> list[psutil.Process]:
    """The running processes below this one."""
    return [p for p in psutil.Process().children(recursive=True) if is_alive(p)]


def _signal_all(number: int) -> None:
    for process in _descendants():
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def _reap_orphans(main: int) -> None:
    """Reap ended descendants that became children of this process (Linux). `main` is left to its Popen object."""
    if sys.platform != "linux":
        return
    try:
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != main:
            os.waitpid(ended.si_pid, 0)
    except ChildProcessError:  # there are no children
        pass


def main() -> None:
    parent, grace, _, *command = sys.argv[1:]
    code = supervise(command, int(parent), float(grace))
    if code < 0:  # end by the command's signal, so that the caller sees it, but write no core dump
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
