"""Processes that end with the process that started them. What needs `prctl` has an effect on Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import psutil

GRACE_SECONDS = 10.0
"""How long a process may take to end after SIGTERM, before it is killed."""

START_TOLERANCE = 2.0
"""Seconds by which a process's start may seem to move: systems give the machine's start to the second."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # from <sys/prctl.h>

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even if the parent was killed (out of memory, say).

    Called in a child between fork and exec (`preexec_fn`)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent has ended, and send it SIGTERM when its own parent
    ends. So a supervisor can find and end everything that its command has started."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def process_mark() -> str:
    """What tells this process from every other one of this machine, a later one with its pid too: `pid:seconds`.

    The seconds are from the machine's start to the process's, which no change of the clock alters."""
    return f"{os.getpid()}:{_start(psutil.Process()):.2f}"


def process_is_there(mark: str) -> bool:
    """Whether the process of a `process_mark` runs. A mark of a pid alone is of any process with that pid."""
    pid, _, seconds = mark.partition(":")
    try:
        process = psutil.Process(int(pid))
        return is_alive(process) and (not seconds or abs(_start(process) - float(seconds)) < START_TOLERANCE)
    except psutil.NoSuchProcess:
        return False


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs. A zombie, which has ended and waits to be collected, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()
