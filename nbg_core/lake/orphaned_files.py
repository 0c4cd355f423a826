"""Orphaned files: a writer that is killed between writing a Parquet file and committing it leaves the file behind.

DuckLake lists such files (`ducklake_delete_orphaned_files`) but cannot tell them from the files of another catalog that
shares the data path, nor from Parquet files that a person has put there. So every lake *claims* its data path: when it
is opened, it writes a small file into `<data_path>/.catalogs` (`claims`). A file is deleted only if no other lake has a
claim, the file is named as DuckLake or `Lake.commit` name files, and it was written after our own claim and more than
KEEP_SECONDS ago, which is longer than any commit takes. What was written before our claim stays.

In an object store nothing is deleted.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from nbg_core.lake.claims import claim_path, other_claims
from nbg_core.lake.conflicts import retry_on_conflict
from nbg_core.lake.lake import Lake

KEEP_SECONDS = 24 * 3600.0
"""Age at which an orphaned file is deleted: its writer has ended by then."""

_OURS = re.compile(
    r"(\w+/\w+/ducklake-[0-9a-f-]{36}\.parquet|registered/[\w.]+/[0-9a-f]{32}-[0-9a-f]{32}\.(parquet|tmp))"
)
"""Paths below the data path: of files that DuckLake writes for an insert or a delete, and of those that `Lake.commit`
writes and registers."""


def delete_orphaned_files(lake: Lake) -> list[Path]:
    """Delete the orphaned files of this lake that are older than KEEP_SECONDS. Safe while others write.

    Returns what was deleted. Raises ValueError when another catalog keeps its files in the same place, and names it."""
    mine = claim_path(lake.catalog, lake.data_path)
    if mine is None or not mine.exists():
        return []
    if others := list(other_claims(mine, lake.data_path)):
        raise ValueError(
            f"files without a commit are not deleted: {', '.join(others)} keeps its files in {lake.data_path}, too; "
            "give each lake a lake.data_path of its own"
        )
    since, until = mine.stat().st_mtime, time.time() - KEEP_SECONDS
    deleted = []
    for path in retry_on_conflict(_unknown, lake):
        try:
            if since < path.stat().st_mtime < until:
                path.unlink()
                deleted.append(path)
        except FileNotFoundError:  # another `nbg compact` deleted it, or its writer renamed it
            pass
    return deleted


def _unknown(lake: Lake) -> list[Path]:
    """Orphaned files below the data path whose names are those that writers of a lake give."""
    con = lake.connect(read_only=False)  # DuckLake needs a writable lake to list them
    try:
        listed = con.execute("FROM ducklake_delete_orphaned_files('lake', dry_run => true, cleanup_all => true)")
        found = [Path(path) for (path,) in listed.fetchall()]
    finally:
        con.close()
    folder = Path(lake.data_path)
    inside = [p for p in {*found, *folder.glob("registered/*/*.tmp")} if p.is_file() and p.is_relative_to(folder)]
    return sorted(p for p in inside if _OURS.fullmatch(p.relative_to(folder).as_posix()))
