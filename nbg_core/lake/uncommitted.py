"""Files that no commit knows: a writer that was killed between writing a Parquet file and its commit leaves it behind.

DuckLake lists such files (`ducklake_delete_orphaned_files`) but cannot tell them from the files of another catalog that
shares the data path, nor from Parquet files that a person has put there. So every lake *claims* its data path: when it
is opened, it writes a small file into `<data_path>/.catalogs`. A file is deleted only if no other lake has a claim, the
file has the name that DuckLake or `Lake.commit` gives, and it was written after our own claim and more than
KEEP_SECONDS ago: no commit takes so long. What a writer had written before the first claim stays.

In an object store nothing is deleted.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nbg_core.base.errors import redact
from nbg_core.base.files import write_json
from nbg_core.base.ids import digest

if TYPE_CHECKING:
    from nbg_core.lake.lake import Lake

KEEP_SECONDS = 24 * 3600.0
"""Age at which a file without a commit is deleted: its writer has ended."""

_OURS = re.compile(
    r"(\w+/\w+/ducklake-[0-9a-f-]{36}\.parquet|registered/[\w.]+/[0-9a-f]{32}-[0-9a-f]{32}\.(parquet|tmp))"
)
"""Below the data path: what DuckLake writes for an insert or a delete, and what `Lake.commit` writes and registers."""


def claim(catalog: str, data_path: str) -> None:
    """Note in the data path that this catalog keeps its files there. Does nothing in an object store, or where this
    user may not write."""
    path = _claim_path(catalog, data_path)
    if path is None or path.exists():
        return
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"catalog": redact(catalog), "data_path": data_path})
    except OSError:  # a lake that may only be read
        pass


def delete_uncommitted(lake: Lake) -> list[Path]:
    """Delete the files of this lake that no commit knows and that are older than KEEP_SECONDS; safe beside writers.

    Returns what was deleted. Raises ValueError, naming it, when another catalog keeps its files in the same place."""
    mine = _claim_path(lake.catalog, lake.data_path)
    if mine is None or not mine.exists():
        return []
    if others := list(_other_claims(mine, lake.data_path)):
        raise ValueError(
            f"files without a commit are not deleted: {', '.join(others)} keeps its files in {lake.data_path}, too; "
            "give each lake a lake.data_path of its own"
        )
    since, until = mine.stat().st_mtime, time.time() - KEEP_SECONDS
    deleted = []
    for path in _unknown(lake):
        if since < path.stat().st_mtime < until:
            path.unlink(missing_ok=True)
            deleted.append(path)
    return deleted


def _claim_path(catalog: str, data_path: str) -> Path | None:
    if "://" in data_path:
        return None
    return Path(data_path) / ".catalogs" / f"{digest('claim', redact(catalog), data_path)}.json"


def _other_claims(mine: Path, data_path: str) -> Iterator[str]:
    """Catalogs that keep their files here, besides ours. The claim of a lake that was moved or copied together with its
    files, or whose SQLite catalog is gone, is void."""
    for path in sorted(mine.parent.glob("*.json")):
        if path == mine:
            continue
        other = json.loads(path.read_text())
        kind, _, where = other["catalog"].partition(":")
        if other["data_path"] == data_path and (kind != "sqlite" or Path(where).exists()):
            yield other["catalog"]


def _unknown(lake: Lake) -> Iterator[Path]:
    """Files below the data path that a writer of a lake made and that the catalog does not know."""
    con = lake.connect(read_only=False)  # DuckLake lists them to writers alone
    try:
        listed = con.execute("FROM ducklake_delete_orphaned_files('lake', dry_run => true, cleanup_all => true)")
        found = [Path(path) for (path,) in listed.fetchall()]
    finally:
        con.close()
    folder = Path(lake.data_path)
    for path in sorted({*found, *folder.glob("registered/*/*.tmp")}):
        if path.is_file() and path.is_relative_to(folder) and _OURS.fullmatch(path.relative_to(folder).as_posix()):
            yield path
