"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import signal
import sys

import psutil

GRACE_SECONDS = 10.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal `number` when its parent ends, however it ends. Linux only.

    As the `preexec_fn` of a command it covers a parent that is killed outright, which cannot end anything itself."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent has ended. Linux only."""
    if _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs. A zombie, which has ended and waits to be collected, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
