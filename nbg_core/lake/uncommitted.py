"""Files that no commit knows: a writer that was killed between writing a Parquet file and its commit leaves it behind.

DuckLake lists such files (`ducklake_delete_orphaned_files`) but cannot tell them from the files of another catalog that
shares the data path, nor from Parquet files that a person has put there. So every lake *claims* its data path: when it
is opened, it writes a small file into `<data_path>/.catalogs`. A file is deleted only if no other lake has a claim, the
file has the name that DuckLake or `Lake.commit` gives, and it was written after our own claim and more than
KEEP_SECONDS ago: no commit takes so long. What a writer had written before the first claim stays.

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
"""Age at which a file without a commit is deleted: its writer has ended."""

_OURS = re.compile(
    r"(\w+/\w+/ducklake-[0-9a-f-]{36}\.parquet|registered/[\w.]+/[0-9a-f]{32}-[0-9a-f]{32}\.(parquet|tmp))"
)
"""Below the data path: what DuckLake writes for an insert or a delete, and what `Lake.commit` writes and registers."""


def delete_uncommitted(lake: Lake) -> list[Path]:
    """Delete the files of this lake that no commit knows and that are older than KEEP_SECONDS; safe beside writers.

    Returns what was deleted. Raises ValueError, naming it, when another catalog keeps its files in the same place."""
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
        except FileNotFoundError:  # another `nbg compact` was quicker, or its writer put it in its place
            pass
    return deleted


def _unknown(lake: Lake) -> list[Path]:
    """Files below the data path that a writer of a lake made and that the catalog does not know."""
    con = lake.connect(read_only=False)  # DuckLake lists them to writers alone
    try:
        listed = con.execute("FROM ducklake_delete_orphaned_files('lake', dry_run => true, cleanup_all => true)")
        found = [Path(path) for (path,) in listed.fetchall()]
    finally:
        con.close()
    folder = Path(lake.data_path)
    inside = [p for p in {*found, *folder.glob("registered/*/*.tmp")} if p.is_file() and p.is_relative_to(folder)]
    return sorted(p for p in inside if _OURS.fullmatch(p.relative_to(folder).as_posix()))
