"""How far a stage is, and commits at intervals."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

COMMIT_SECONDS = 30.0
"""What finishes this long after the last commit is committed at once, with what finished before it."""


class CommitBuffer(Generic[T]):
    """Finished work on its way into the lake: committed every COMMIT_SECONDS while it comes, when `flush` says so, and
    at the end of the `with`, however it ends. `new_rows` counts what the commits say that they wrote."""

    def __init__(self, commit: Callable[[list[T]], int]):
        self._commit, self._last, self.new_rows = commit, time.monotonic(), 0
        self._items: list[T] = []

    def add(self, item: T) -> None:
        self._items.append(item)
        if time.monotonic() - self._last > COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """A commit that a signal cuts short is made again at the end of the `with`: rows that are there already are
        left as they are."""
        if self._items:
            try:
                self.new_rows += self._commit(self._items)
            except Exception:  # it will fail again
                self._items = []
                raise
            self._items = []
        self._last = time.monotonic()

    def __enter__(self) -> CommitBuffer[T]:
        return self

    def __exit__(self, *_) -> None:
        self.flush()


class Progress:
    """Says `what: done/total, rate, time left` at most once a second, and always at the end.

    How long the first advance takes is no measure of the rest: models load, layers compile."""

    def __init__(self, what: str, total: int, log: Callable[[str], None]):
        self.what, self.total, self.done, self._log = what, total, 0, log
        self._start = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None

    def advance(self, n: int, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        since, before = self._first or (self._start, 0)
        if now - since < 1:  # all came at once, after the work
            since, before = self._start, 0
        is_measured = self._first is not None or self.done >= self.total
        self._first = self._first or (now, self.done)
        if now - self._last < 1 and self.done < self.total:
            return
        self._last = now
        speed = ""
        if is_measured and self.done > before:
            rate = (self.done - before) / max(now - since, 1e-9)
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.done < self.total else ""
            speed = f", {rate:.1f}/s{left}"
        self._log(f"{self.what}: {self.done}/{self.total}{speed}{', ' + note if note else ''}")
