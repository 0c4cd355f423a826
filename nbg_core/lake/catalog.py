"""Creates the lake's catalog, tables and views, and corrects the paths of a lake that was moved."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from nbg_core.base.ids import digest
from nbg_core.lake import tables
from nbg_core.lake.attach import LakeError, lake_error
from nbg_core.lake.claims import claim
from nbg_core.lake.conflicts import retry_on_conflict
from nbg_core.lake.teacher_columns import GAP_ZERO
from nbg_core.lake.views import VIEWS

if TYPE_CHECKING:
    from nbg_core.lake.lake import Lake


def create(lake: Lake) -> None:
    """Make catalog, tables and views where they are missing.

    With a SQLite catalog, one process at a time does this. With Postgres, a process that meets another one retries.
    Raises LakeError when it is not possible."""
    kind, _, where = lake.catalog.partition(":")
    try:
        if "://" not in lake.data_path:
            Path(lake.data_path).mkdir(parents=True, exist_ok=True)
        claim(lake.catalog, lake.data_path)
        if kind == "sqlite":
            _create_file(lake, Path(where))
        else:
            retry_on_conflict(create_tables, lake)
    except (OSError, sqlite3.Error) as e:
        raise lake_error(lake.catalog, lake.data_path, "created", e) from None


def _create_file(lake: Lake, catalog: Path) -> None:
    ready = catalog.with_suffix(".ready")  # contains the data path and digests of tables and views
    wanted = f"{lake.data_path}\n{tables.version()} {digest(VIEWS)}"
    if catalog.exists() and ready.exists() and ready.read_text() == wanted:
        return
    catalog.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(catalog.with_suffix(".lock")):
        if catalog.exists():
            _follow_move(lake, catalog)
        create_tables(lake)
        temporary = ready.with_suffix(".tmp")
        temporary.write_text(wanted)
        temporary.rename(ready)


def _follow_move(lake: Lake, catalog: Path) -> None:
    """Correct the absolute paths in a catalog after the lake's folder was moved or copied."""
    with closing(sqlite3.connect(catalog, timeout=10)) as con, con:
        known = con.execute("SELECT 1 FROM sqlite_master WHERE name = 'ducklake_metadata'").fetchone()
        old = known and con.execute("SELECT value FROM ducklake_metadata WHERE key = 'data_path'").fetchone()
        if not old or Path(old[0]) == Path(lake.data_path):
            return
        old, new = old[0].rstrip("/") + "/", lake.data_path.rstrip("/") + "/"
        paths = [p for (p,) in con.execute("SELECT path FROM ducklake_data_file WHERE NOT path_is_relative")]
        gone = [p for p in paths if not Path(new, p.removeprefix(old)).exists()]
        if gone:
            raise LakeError(
                f"the lake at {catalog} was made with its files in {old}; now they should be in {new}, but "
                f"{gone[0].removeprefix(old)} is not there ({len(gone)} missing); move the files there, or set "
                "lake.data_path to where they are"
            )
        con.execute("UPDATE ducklake_metadata SET value = ? WHERE key = 'data_path'", [new])
        for table in ("ducklake_data_file", "ducklake_delete_file"):
            there = "NOT path_is_relative AND substr(path, 1, ?) = ?"
            moved = f"UPDATE {table} SET path = ? || substr(path, ?) WHERE {there}"
            con.execute(moved, [new, len(old) + 1, len(old), old])


def create_tables(lake: Lake) -> None:
    """Make missing tables and columns, and all views, in one transaction."""
    with lake.connection(read_only=False) as con:
        con.execute("BEGIN")
        con.execute("CREATE SCHEMA IF NOT EXISTS lineage")
        for table in tables.TABLES:
            columns = {n: tables.sql_type(t) for n, t in tables.polars_schema(table).items()}
            made = ", ".join(f"{n} {t}" for n, t in columns.items())
            con.execute(f"CREATE TABLE IF NOT EXISTS {table} ({made})")
            there = {name for name, *_ in con.execute(f"DESCRIBE {table}").fetchall()}
            # A table made by an earlier version: its old rows get null.
            for n in columns:
                if n not in there:
                    con.execute(f"ALTER TABLE {table} ADD COLUMN {n} {columns[n]}")
        for name, body in VIEWS.items():
            con.execute(f"CREATE OR REPLACE VIEW {name} AS {body.format(lake='lake', zero=GAP_ZERO)}")
        con.execute("COMMIT")
        # DuckLake would store small inserts in the catalog as text, and a brace in a message makes that unreadable.
        con.execute("CALL lake.set_option('data_inlining_row_limit', 0, table_name => 'queries')")
