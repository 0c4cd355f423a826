"""What a commit consists of: rows to write, and the record of what made them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import polars as pl

Frames = Callable[[], Iterable[pl.DataFrame]]
"""A function that gives rows frame by frame; it is called again when the commit is retried."""


@dataclass(frozen=True)
class Input:
    """What a materialisation read: an upstream partition's content and the snapshot it was read at."""

    asset: str
    slice_name: str | None
    data_version: str
    snapshot: int

    def as_json(self) -> dict:
        """An element of the JSON list in `lineage.materialisations.inputs`."""
        return {
            "asset": self.asset,
            "slice": self.slice_name,
            "data_version": self.data_version,
            "snapshot": self.snapshot,
        }


@dataclass(frozen=True)
class Record:
    """The lineage of one commit. `settings` are only those that decide the asset's content."""

    asset: str
    slice_name: str | None
    run_id: str
    profile: str
    status: str = "complete"
    settings: dict = field(default_factory=dict)
    settings_id: str = "none"
    inputs: Sequence[Input] = ()
    data_version: str | None = None
    materialisation_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Write:
    """Rows for one table, without `materialisation_id` (the commit adds it).

    Rows whose primary key is already there are left as they are, unless `replace` is given: an SQL condition (with
    `params`) whose rows are deleted first. With `as_file`, for tables with large arrays, the rows are written as a
    Parquet file with a compact encoding beside the lake's own files, and the file is registered. In an object store
    `as_file` has no effect.

    Rows that do not fit in memory at once come from a function (`Frames`)."""

    table: str
    rows: pl.DataFrame | Callable[[], Iterable[pl.DataFrame]]
    replace: str | None = None
    params: tuple = ()
    as_file: bool = False


@dataclass(frozen=True)
class Commit:
    materialisation_id: str
    snapshot: int
    n_rows: int
