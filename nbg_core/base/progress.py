"""Progress messages of a stage, and commits at intervals."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

COMMIT_SECONDS = 30.0
"""A CommitBuffer commits when an item is added this many seconds after the last commit."""


class CommitBuffer(Generic[T]):
    """Collects finished items and commits them together: when an item is added more than COMMIT_SECONDS after the last
    commit, at each `flush`, and when the `with` block ends, by an exception too.

    `commit` writes a list of items and returns the number of new rows; `new_rows` is the sum of these numbers."""

    def __init__(self, commit: Callable[[list[T]], int]):
        self._commit, self._last, self.new_rows = commit, time.monotonic(), 0
        self._items: list[T] = []

    def add(self, item: T) -> None:
        self._items.append(item)
        if time.monotonic() - self._last > COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Commit what was added since the last commit.

        When a signal interrupts a commit, its items are kept and committed again at the end of the `with` block. Rows
        that are in the lake by then are not written twice."""
        if self._items:
            try:
                self.new_rows += self._commit(self._items)
            except Exception:  # a second attempt at the end of the `with` block would fail too, and hide this error
                self._items = []
                raise
            self._items = []
        self._last = time.monotonic()

    def __enter__(self) -> CommitBuffer[T]:
        return self

    def __exit__(self, *_) -> None:
        self.flush()


class Progress:
    """Logs `what: done/total, rate, time left` at most once a second, and always at the end.

    The rate is measured from the first `advance`, so that loading models and compiling layers do not count."""

    def __init__(self, what: str, total: int, log: Callable[[str], None]):
        self.what, self.total, self.done, self._log = what, total, 0, log
        self._start = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` more as done; `note` is added to the message."""
        self.done += n
        now = time.monotonic()
        since, before = self._first or (self._start, 0)
        if now - since < 1:  # too short to measure: count from the start
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
