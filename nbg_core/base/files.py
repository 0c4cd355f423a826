"""Files that are there whole or not at all, and locks that go with their process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
from filelock import FileLock, Timeout


@contextmanager
def hold(lock: Path, me: str, what: str) -> Iterator[None]:
    """Hold a lock; it goes with the process, however that ends. Raises RuntimeError: `what`, then who holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    holder = lock.with_suffix(".holder")
    try:
        with FileLock(lock, timeout=0):
            holder.write_text(me)
            yield
    except Timeout as e:
        who = holder.read_text() if holder.exists() else "another run"
        raise RuntimeError(f"{what} {who}; wait for it or terminate it, then run again") from e


def write_json(path: Path, data: dict) -> None:
    """Write whole or not at all; what JSON does not know is written as text."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, default=str))
    temporary.rename(path)


def link_folder(source: Path, target: Path) -> None:
    """Make `target`, whole or not at all, with the files of `source`: hard links, or copies across file systems."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, temporary, copy_function=_link)
    temporary.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


ROW_GROUP_BYTES = 32 << 20
"""Of values before encoding: a reader holds a row group or more at once."""


def write_parquet(rows: pl.DataFrame, path: Path, split: Collection[str] = ()) -> None:
    """Write rows as Parquet with zstd. Numbers in the list columns `split` are stored byte by byte (first bytes, second
    bytes, ...), which is small where some bytes are mostly equal; other columns get a dictionary."""
    import pyarrow as pa  # not at every start: only where rows are written
    import pyarrow.parquet as pq

    table = rows.to_arrow()
    lists = {f.name for f in table.schema if pa.types.is_large_list(f.type)}
    leaf = {name: f"{name}.list.element" if name in lists else name for name in table.column_names}
    pq.write_table(
        # A lake that knows the bounds of some rows of a table, but not of a registered file, skips the file's rows.
        table, path, compression="zstd", compression_level=9, write_statistics=[c for c in leaf if c not in lists],
        row_group_size=max(1, table.num_rows * ROW_GROUP_BYTES // max(1, table.nbytes)),
        use_dictionary=[leaf[c] for c in leaf if c not in split],
        column_encoding={leaf[c]: "BYTE_STREAM_SPLIT" for c in split},
    )  # fmt: skip
