"""Processes that end with the process that started them. What needs `prctl` has an effect on Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

import psutil

GRACE_SECONDS = 10.0
"""How long a process may take to end after SIGTERM, before it is killed."""

START_TOLERANCE = 2.0
"""Seconds by which two readings of one process's start may differ: some systems give the boot time in whole seconds."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # from <sys/prctl.h>

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def free_port(host: str) -> int:
    """A TCP port of `host` (an address of this machine, or "" for all) that is free now; another process may take it
    before it is used."""
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even if the parent was killed (out of memory, say).

    Called in a child between fork and exec (`preexec_fn`). To the kernel the parent is the thread that forked, so
    start the child from a thread that outlives it."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Make this process the new parent of descendants whose own parent has ended, and have the kernel send it SIGTERM
    when its own parent ends. So a supervisor can find and end everything that its command has started."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def process_key() -> str:
    """An identifier of this process, `pid:seconds`, that no other process of this machine shares, even a later one with
    the same pid.

    The seconds are those from boot to the start of the process. They do not change when the clock is set."""
    return f"{os.getpid()}:{_start(psutil.Process()):.2f}"


def process_is_running(mark: str) -> bool:
    """Whether the process that a `process_key` identifies is running. A mark without seconds, which earlier versions
    wrote, matches any process with that pid."""
    pid, _, seconds = mark.partition(":")
    try:
        process = psutil.Process(int(pid))
        return is_alive(process) and (not seconds or abs(_start(process) - float(seconds)) < START_TOLERANCE)
    except psutil.NoSuchProcess:
        return False


def is_alive(process: psutil.Process) -> bool:
    """Whether a process is running. A zombie, which has ended and waits to be reaped, is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()
