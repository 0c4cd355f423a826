"""Files that are written whole or not at all, locks that are released when their process ends, and Parquet files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
from filelock import FileLock, Timeout


@contextmanager
def hold(lock: Path, holder: str, what: str) -> Iterator[None]:
    """Hold the lock file `lock` for the `with` block. The system releases it when the process ends, however it ends.

    `holder` describes this process and is written beside the lock. Raises RuntimeError when another process has the
    lock; the message is `what`, followed by that process's `holder`."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    holder_path = lock.with_suffix(".holder")
    file_lock = FileLock(lock)
    try:
        file_lock.acquire(timeout=0)
    except Timeout as e:
        other = holder_path.read_text() if holder_path.exists() else "another run"
        raise RuntimeError(f"{what} {other}; wait for it or terminate it, then run again") from e
    try:
        holder_path.write_text(holder)
        yield
    finally:
        file_lock.release()


@contextmanager
def wait_for(lock: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `lock` for the `with` block. If another process has it, call `on_wait` once, then wait."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(lock)
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        file_lock.acquire()
    try:
        yield
    finally:
        file_lock.release()


def write_json(path: Path, data: dict) -> None:
    """Write `data` as JSON, whole or not at all. Values that JSON does not have are written as strings."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, default=str))
    temporary.rename(path)


def link_folder(source: Path, target: Path) -> None:
    """Make the folder `target`, whole or not at all, from the files of `source`: as hard links where the file system
    has them, else as copies."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, temporary, copy_function=_link)
    temporary.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # source and target are on different file systems, or this one has no hard links
        shutil.copy2(source, target)


ROW_GROUP_BYTES = 32 << 20
"""Size of a row group before encoding. A reader holds at least one whole row group in memory."""


def write_parquet(frame: pl.DataFrame, path: Path, split: Collection[str] = ()) -> None:
    """Write a frame as Parquet with zstd.

    The numbers of the list columns in `split` are encoded as BYTE_STREAM_SPLIT: all first bytes, then all second bytes,
    and so on. That compresses well where some of the bytes are mostly equal. Other columns get a dictionary."""
    import pyarrow as pa  # slow to import, and only needed where a file is written
    import pyarrow.parquet as pq

    table = frame.to_arrow()
    lists = {f.name for f in table.schema if pa.types.is_large_list(f.type)}
    leaf = {name: f"{name}.list.element" if name in lists else name for name in table.column_names}
    pq.write_table(
        # When DuckLake filters, it skips a file without column statistics if other files of the table have them.
        table, path, compression="zstd", compression_level=9, write_statistics=[c for c in leaf if c not in lists],
        row_group_size=max(1, table.num_rows * ROW_GROUP_BYTES // max(1, table.nbytes)),
        use_dictionary=[leaf[c] for c in leaf if c not in split],
        column_encoding={leaf[c]: "BYTE_STREAM_SPLIT" for c in split},
    )  # fmt: skip
