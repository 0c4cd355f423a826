"""Attaches the lake to a DuckDB connection, and says what to do when that fails.

The extensions are Python packages of this environment; nothing is downloaded.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import duckdb
from duckdb_extensions import import_extension

from nbg_core.base.errors import redact
from nbg_core.lake.conflicts import is_conflict


class LakeError(RuntimeError):
    """The lake cannot be opened or written: names the place and the remedy."""


def attach(catalog: str, data_path: str, *, read_only: bool, snapshot: int | None = None) -> duckdb.DuckDBPyConnection:
    """A new DuckDB connection with the lake attached as `lake`, optionally as it was at `snapshot`.

    Raises LakeError when it cannot be opened, LookupError for an unknown snapshot."""
    kind = catalog.partition(":")[0]
    options = [f"DATA_PATH '{_quoted(data_path)}'"]
    if kind == "sqlite":
        options.append("META_BUSY_TIMEOUT 10000")
        if not read_only:  # setting it is a write; the file remembers it
            options.append("META_JOURNAL_MODE 'WAL'")
    if read_only:
        options.append("READ_ONLY")
    if snapshot is not None:
        options.append(f"SNAPSHOT_VERSION {int(snapshot)}")
    con = duckdb.connect()
    try:
        _import_extensions(kind)
        for extension in _extensions(kind):
            con.load_extension(extension)
        con.execute(f"ATTACH 'ducklake:{_quoted(catalog)}' AS lake ({', '.join(options)})")
    except (ImportError, LakeError):
        con.close()
        raise
    except duckdb.Error as e:  # its message contains the connection string: it is shown only redacted, never chained
        con.close()
        if is_conflict(e):
            raise
        if snapshot is not None and "No snapshot found" in str(e):
            raise LookupError(
                f"the lake has no snapshot {snapshot}; the newest is {_newest_snapshot(catalog, data_path)}"
            ) from None
        raise lake_error(catalog, data_path, "opened", e) from None
    return con


def lake_error(catalog: str, data_path: str, what: str, error: Exception) -> LakeError:
    """The error to show: place, cause without secrets, and remedy. `what` could not be done: 'opened', 'created' or
    'written'."""
    kind, _, where = catalog.partition(":")
    if kind == "sqlite":
        remedy = (
            f"if permissions are the cause, make {Path(where).parent} and {data_path} writable for this user, for "
            "reading too (SQLite keeps files of its own beside the catalog); or set `lake` in the profile to another "
            "folder"
        )
    else:
        remedy = "check lake.catalog in the profile, and that the database is up and lets this user in"
    return LakeError(redact(f"the lake at {catalog} cannot be {what}: {error}; {remedy}"))


def _newest_snapshot(catalog: str, data_path: str) -> int:
    con = attach(catalog, data_path, read_only=True)
    try:
        [(newest,)] = con.execute("SELECT max(snapshot_id) FROM ducklake_snapshots('lake')").fetchall()
        return newest
    finally:
        con.close()


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _extensions(kind: str) -> list[str]:
    metadata = {"sqlite": "sqlite_scanner", "postgres": "postgres_scanner"}
    if kind not in metadata:
        raise LakeError(f"lake.catalog starts with {kind!r}; use 'sqlite:PATH' or 'postgres:CONNECTION STRING'")
    return ["ducklake", metadata[kind]]


@cache
def _import_extensions(kind: str) -> None:
    for extension in _extensions(kind):
        import_extension(extension)
