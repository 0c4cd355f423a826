"""What a stage gets to work with: profile, lake, run id, and a way to say how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from nbg_core import lineage
from nbg_core.config import Profile
from nbg_core.lake import Commit, Input, Lake, Record, Write

T = TypeVar("T")


@dataclass
class Run:
    profile: Profile
    lake: Lake
    run_id: str = "local"
    log: Callable[[str], None] = print
    policy: lineage.Policy = field(init=False)

    def __post_init__(self):
        self.policy = lineage.current_policy(self.lake, self.profile)

    def settings(self, asset: str, slice: str | None) -> dict:
        return lineage.settings_of(asset, self.profile, self.policy, slice)

    def read(self, *assets: str, slice: str | None) -> tuple[int, list[Input]]:
        """The snapshot to read at, and the input records of the upstream partitions as of it.

        Raises LookupError if one was never materialised."""
        snapshot = self.lake.snapshot()
        return snapshot, [lineage.input_of(self.lake, asset, slice, snapshot) for asset in assets]

    def commit(
        self,
        asset: str,
        slice: str | None,
        writes: Iterable[Write] = (),
        *,
        inputs: Iterable[Input] = (),
        data_version: str | None = None,
    ) -> Commit:
        """Commit `writes` with their lineage. With a `data_version` the partition is complete; without, it is a
        chunk: work that a later run finds and does not do again."""
        settings = self.settings(asset, slice)
        record = Record(
            asset=asset, slice=slice, run_id=self.run_id, profile=self.profile.name,
            status="chunk" if data_version is None else "complete", settings=settings,
            settings_id=lineage.settings_id(settings), inputs=list(inputs), data_version=data_version,
        )  # fmt: skip
        return self.lake.commit(record, list(writes))

    def progress(self, what: str, total: int) -> Progress:
        return Progress(what, total, self.log)


COMMIT_SECONDS = 30.0
"""What finishes this long after the last commit is committed at once, with what finished before it."""


class Finished(Generic[T]):
    """Finished work on its way into the lake: committed every COMMIT_SECONDS while it comes, when `flush` says so, and
    at the end of the `with`, however it ends. `new_rows` counts what the commits say that they wrote."""

    def __init__(self, commit: Callable[[list[T]], int]):
        self._commit, self._items, self._last, self.new_rows = commit, [], time.monotonic(), 0

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

    def __enter__(self) -> Finished[T]:
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
