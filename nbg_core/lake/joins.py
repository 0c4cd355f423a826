"""Joins of tables that do not fit into memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import duckdb
import psutil

from nbg_core.lake.attach import LakeError, attach
from nbg_core.lake.lake import Lake

T = TypeVar("T")

JOIN_MEMORY = 200 << 20
"""Bytes that DuckDB may use to join tables that do not fit into memory."""
OUT_OF_MEMORY = ("Out of Memory", "Current transaction is aborted")
"""Parts of the errors that mean too little memory: DuckDB's own, also inside an OSError of Arrow; and DuckLake's, when
reading its catalog failed for lack of memory and aborted the transaction."""


@contextmanager
def bounded_joins(lake: Lake, snapshot: int, spill: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection for joins of large tables that stay within JOIN_MEMORY: what does not fit goes to the folder
    `spill`, which is removed at the end. A query names the smaller table last; without ORDER BY its rows come in
    any order. `with_room` is for those that need more."""
    shutil.rmtree(spill, ignore_errors=True)  # of one that was killed
    spill.parent.mkdir(parents=True, exist_ok=True)  # DuckDB makes the folder alone
    con = attach(lake.catalog, lake.data_path, read_only=True, snapshot=snapshot)
    try:
        con.execute("USE lake")
        con.execute(f"SET memory_limit = '{JOIN_MEMORY}B'")
        con.execute("SET allocator_flush_threshold = '8MB'")  # give back to the system what was freed
        con.execute("SET allocator_bulk_deallocation_flush_threshold = '8MB'")
        con.execute("SET temp_directory = ?", [str(spill)])
        con.execute("SET threads = 2")  # each needs its share of the memory
        con.execute("SET preserve_insertion_order = false")
        # Fewer rows can be more bytes: the side that is held is the one that the query has last.
        con.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
        yield con
    finally:
        con.close()
        shutil.rmtree(spill, ignore_errors=True)


def with_room(con: duckdb.DuckDBPyConnection, attempt: Callable[[], T], memory: int = JOIN_MEMORY) -> T:
    """`attempt()` within `memory` bytes of DuckDB's, else again with more: it reads 2,048 rows of a file at once,
    however long they are, and not all that it does can go to disk.

    Raises LakeError when the machine has no more."""
    while True:
        try:
            con.execute(f"SET memory_limit = '{memory}B'")
            return attempt()
        except (duckdb.OutOfMemoryException, duckdb.TransactionException, OSError) as e:
            if not any(said in str(e) for said in OUT_OF_MEMORY):
                raise
            if 4 * memory > (free := psutil.virtual_memory().available):
                raise LakeError(
                    f"joining the lake's tables needs more than {memory >> 20} MiB of memory, and {free >> 20} MiB are "
                    "free; end other programs, or train on fewer slices"
                ) from e
            memory *= 4
