"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import signal
import sys

import psutil

GRACE_SECONDS = 10.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """In the command, before it starts: also a supervisor that is killed outright (out of memory) takes it along."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and waits to be collected does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
