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
"""Texts in the error of a query that ran out of memory. DuckDB's own error has the first one, also when Arrow turns it
into an OSError. When DuckLake runs out of memory while it reads its catalog, its next look there fails with the
second."""


@contextmanager
def bounded_joins(lake: Lake, snapshot: int, spill: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to the lake at `snapshot` for joins of large tables. It may use JOIN_MEMORY bytes; the rest is
    spilled to the folder `spill`, which is removed at the end.

    Joins are not reordered, so a query must name the smaller table last: that one is held in memory. Rows come in no
    particular order without ORDER BY. `retry_with_more_memory` runs queries that need more than JOIN_MEMORY."""
    shutil.rmtree(spill, ignore_errors=True)  # left by a process that was killed
    spill.parent.mkdir(parents=True, exist_ok=True)  # DuckDB makes the folder, but not its parents
    con = attach(lake.catalog, lake.data_path, read_only=True, snapshot=snapshot)
    try:
        con.execute("USE lake")
        con.execute(f"SET memory_limit = '{JOIN_MEMORY}B'")
        con.execute("SET allocator_flush_threshold = '8MB'")  # return freed memory to the system
        con.execute("SET allocator_bulk_deallocation_flush_threshold = '8MB'")
        con.execute("SET temp_directory = ?", [str(spill)])
        con.execute("SET threads = 2")  # each needs its share of the memory
        con.execute("SET preserve_insertion_order = false")
        # The optimizer would hold the side with fewer rows in memory, which may have more bytes.
        con.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
        yield con
    finally:
        con.close()
        shutil.rmtree(spill, ignore_errors=True)


def retry_with_more_memory(con: duckdb.DuckDBPyConnection, attempt: Callable[[], T], memory: int = JOIN_MEMORY) -> T:
    """Call `attempt` with a memory limit of `memory` bytes, and again with four times as much while that is too little.

    Not everything can be spilled to disk: DuckDB decodes 2,048 rows of a file at once, however long they are. Raises
    LakeError when the next limit would be more than the free memory."""
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
