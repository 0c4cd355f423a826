"""Merges small files: every commit writes a Parquet file per table, and many small ones are slow to read.

What a reader sees stays the same, at every snapshot, including row ids and insertions: DuckLake writes the rows of
neighbouring files into one file, and records the snapshot of each row. A merge adds a snapshot. Replaced files stay for
KEEP, for readers that have opened them; a later call deletes them.

Files that no commit put into the catalog are deleted by `orphaned_files`.

`teacher_logits` is left as it is: its files are large, and DuckDB would write them without the encoding that makes them
small (`base.files.write_parquet`).
"""

from __future__ import annotations

import polars as pl

from nbg_core.lake import tables
from nbg_core.lake.conflicts import retry_on_conflict, rollback_quietly
from nbg_core.lake.lake import Lake

KEEP = "1 day"


def compact(lake: Lake) -> pl.DataFrame:
    """Merge small files. Columns: table, before, after (numbers of files), one row per table that changed.

    Safe while others write."""
    rows = []
    for table in sorted(tables.TABLES.keys() - tables.BYTE_SPLIT.keys()):
        merged = retry_on_conflict(_merge, lake, table)
        if merged:
            rows.append({"table": table, "before": sum(n for n, _ in merged), "after": sum(n for _, n in merged)})
    retry_on_conflict(_delete_replaced, lake)
    return pl.DataFrame(rows, schema={"table": pl.String, "before": pl.Int64, "after": pl.Int64})


def _merge(lake: Lake, table: str) -> list[tuple[int, int]]:
    """Numbers of files before and after for each group that was merged."""
    schema, _, name = table.rpartition(".")
    with lake.connect(read_only=False) as con:
        con.execute("BEGIN")
        try:
            merged = con.execute(
                "SELECT files_processed, files_created FROM ducklake_merge_adjacent_files('lake', ?, schema => ?)",
                [name, schema or "main"],
            ).fetchall()
            con.execute("CALL lake.set_commit_message(?, ?)", [lake.author, f"{table} compacted"])
            con.execute("COMMIT")
        except BaseException:
            rollback_quietly(con)
            raise
    return merged


def _delete_replaced(lake: Lake) -> None:
    with lake.connect(read_only=False) as con:
        con.execute(f"CALL ducklake_cleanup_old_files('lake', older_than => now() - INTERVAL '{KEEP}')")
