"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import psutil

GRACE_SECONDS = 10.0
START_TOLERANCE = 2.0
"""Seconds by which a process's start may seem to move: systems give the machine's start to the second."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """In the command, before it starts: also a supervisor that is killed outright (out of memory) takes it along."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


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


def _start(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and waits to be collected does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
