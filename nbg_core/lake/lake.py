"""Reading from and writing to the lake: DuckLake tables that change only together with their lineage.

`Lake.sql` reads, now or at a snapshot. `Lake.commit` writes rows and their `lineage.materialisations` row in one
transaction, whose snapshot has the Dagster run id in its commit message. A commit that conflicts with another writer is
retried as a whole. Readers never block writers.

From plain DuckDB: `ATTACH 'ducklake:sqlite:data/lake/catalog.sqlite' AS lake (READ_ONLY)`.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import polars as pl

from nbg_core.base.files import write_parquet
from nbg_core.config import identity
from nbg_core.config.profile import Profile
from nbg_core.lake import catalog, tables
from nbg_core.lake.attach import attach, lake_error
from nbg_core.lake.conflicts import retry_on_conflict, rollback_quietly
from nbg_core.lake.records import Commit, Frames, Record, Write

_STORAGE_ERRORS = re.compile(r"readonly|read-only|IO Error|disk is full|No space", re.IGNORECASE)
"""In messages of DuckDB and SQLite: the disk is the problem, not the statement."""


class Lake:
    def __init__(self, catalog: str, data_path: str, author: str = "nbg"):
        self.catalog, self.data_path, self.author = catalog, data_path, author
        self._attached: dict[tuple[bool, int | None], duckdb.DuckDBPyConnection] = {}

    @classmethod
    def of(cls, profile: Profile) -> Lake:
        """The lake of a profile, created if it is not there yet."""
        kind, _, where = profile.lake.catalog.partition(":")
        if kind == "sqlite":
            where = str(profile.resolve(where))
        data_path = profile.lake.data_path
        if "://" not in data_path:
            data_path = str(profile.resolve(data_path))
        lake = cls(f"{kind}:{where}", data_path, profile.lake.author)
        lake.create()
        return lake

    def create(self) -> None:
        """Make catalog, tables and views where they are missing. Raises LakeError when that is not possible."""
        catalog.create(self)

    def connect(self, *, read_only: bool = True, snapshot: int | None = None) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection whose default catalog is the lake, optionally as it was at `snapshot`.

        Close it after use. Attaching costs 0.1 s, so a process attaches once per mode and hands out connections."""
        key = (read_only, snapshot)
        if key not in self._attached:
            if snapshot is not None:  # only the connection to the last past snapshot is kept
                for old in [k for k in self._attached if k[1] is not None]:
                    self._attached.pop(old).close()
            self._attached[key] = attach(self.catalog, self.data_path, read_only=read_only, snapshot=snapshot)
        con = self._attached[key].cursor()
        con.execute("USE lake")
        con.execute("SET TimeZone = 'UTC'")
        return con

    def sql(self, query: str, params: Sequence = (), *, snapshot: int | None = None) -> pl.DataFrame:
        """The rows of a read-only query, at `snapshot` if given. Lists and structs come as polars types."""
        with self.connection(read_only=True, snapshot=snapshot) as con:
            return con.execute(query, list(params)).pl()

    def snapshot(self) -> int:
        """The newest snapshot id."""
        with self.connection(read_only=True) as con:
            [(newest,)] = con.execute("SELECT max(snapshot_id) FROM ducklake_snapshots('lake')").fetchall()
        return newest

    def commit(self, record: Record, writes: Sequence[Write] = ()) -> Commit:
        """Write `writes` and their lineage in one transaction, retried as a whole on conflicts with other writers.

        Raises dataframely's ValidationError if a frame breaks its contract; then nothing is written."""
        return self._commit(record, [(write, _checked(write, record)) for write in writes])

    def _commit(self, record: Record, ready: list[tuple[Write, Frames]]) -> Commit:
        tried = False

        def attempt() -> int:
            nonlocal tried
            if tried and (n_rows := self._landed(record)) is not None:  # the error came after the commit
                return n_rows
            tried = True
            return self._try_commit(record, ready)

        try:
            n_rows = retry_on_conflict(attempt)
            return Commit(record.materialisation_id, retry_on_conflict(self._snapshot_of, record), n_rows)
        except (duckdb.Error, OSError) as e:  # a read-only folder or a full disk, say
            if isinstance(e, duckdb.Error) and not _STORAGE_ERRORS.search(str(e)):
                raise
            raise lake_error(self.catalog, self.data_path, "written", e) from None

    def _try_commit(self, record: Record, ready: list[tuple[Write, Frames]]) -> int:
        files: list[Path] = []
        with self.connection(read_only=False) as con:
            con.execute("BEGIN")
            try:
                n_rows = 0
                for write, frames in ready:
                    if write.replace is not None:
                        con.execute(f"DELETE FROM {write.table} WHERE {write.replace}", list(write.params))
                    for rows in frames():
                        if write.replace is None:
                            rows = _without_present(con, write.table, rows)
                        n_rows += self._insert(con, write, rows, record, files)
                row = self._lineage_row(record, n_rows)  # noqa: F841  (DuckDB reads it by name)
                con.execute("INSERT INTO lineage.materialisations BY NAME SELECT * FROM row")
                extra = json.dumps({"materialisation_id": record.materialisation_id, "run_id": record.run_id})
                what = record.asset + (f"[{record.slice_name}]" if record.slice_name else "")
                con.execute(
                    "CALL lake.set_commit_message(?, ?, extra_info => ?)",
                    [self.author, f"{what} {record.status}, run {record.run_id}", extra],
                )
                con.execute("COMMIT")
            except BaseException:
                rollback_quietly(con)
                # An interrupt can come after the commit, before its return.
                if files and retry_on_conflict(self._landed, record) is None:
                    for path in files:
                        path.unlink(missing_ok=True)
                raise
        return n_rows

    def _snapshot_of(self, record: Record) -> int:
        with self.connection(read_only=False) as con:  # reuses the attached writer
            [(snapshot,)] = con.execute(
                "SELECT snapshot_id FROM lineage.materialisations WHERE materialisation_id = ?",
                [record.materialisation_id],
            ).fetchall()
        return snapshot

    def _landed(self, record: Record) -> int | None:
        """The number of rows that a commit wrote; None if the commit is not in the lake."""
        rows = self.sql(
            "SELECT n_rows FROM lineage.materialisations WHERE materialisation_id = ?", [record.materialisation_id]
        )
        return None if rows.is_empty() else rows.item()

    def _insert(self, con, write: Write, rows: pl.DataFrame, record: Record, files: list[Path]) -> int:
        if rows.is_empty():
            return 0
        if write.as_file and "://" not in self.data_path:
            name = f"{record.materialisation_id}-{uuid.uuid4().hex}.parquet"
            path = Path(self.data_path) / "registered" / write.table / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            write_parquet(rows, temporary, tables.BYTE_SPLIT.get(write.table, ()))
            temporary.rename(path)
            files.append(path)
            con.execute("CALL ducklake_add_data_files('lake', ?, ?)", [write.table, str(path)])
        else:
            con.execute(f"INSERT INTO {write.table} BY NAME SELECT * FROM rows")
        return rows.height

    @staticmethod
    def _lineage_row(record: Record, n_rows: int) -> pl.DataFrame:
        return tables.frame("lineage.materialisations", [{
            "materialisation_id": record.materialisation_id, "asset": record.asset, "slice": record.slice_name,
            "run_id": record.run_id, "status": record.status, "n_rows": n_rows, "data_version": record.data_version,
            "settings_id": record.settings_id, "settings": json.dumps(record.settings, sort_keys=True, default=str),
            "inputs": json.dumps([i.as_json() for i in record.inputs]), "profile": record.profile,
            "code_version": identity.CODE_VERSION, "created_at": datetime.now(UTC),
        }])  # fmt: skip

    @contextmanager
    def connection(self, *, read_only: bool, snapshot: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
        """The connection of `connect`, closed at the end of the `with` block."""
        con = self.connect(read_only=read_only, snapshot=snapshot)
        try:
            yield con
        finally:
            con.close()


def _checked(write: Write, record: Record) -> Frames:
    """The frames of a write, with `materialisation_id` added, validated against the table's schema: a single frame now,
    before the transaction begins; the frames of a function as they are written."""

    def check(rows: pl.DataFrame) -> pl.DataFrame:
        return tables.validate(write.table, rows.with_columns(materialisation_id=pl.lit(record.materialisation_id)))

    given = write.rows
    if callable(given):
        return lambda: map(check, given())
    rows = check(given)
    return lambda: [rows]


def _without_present(con, table: str, rows: pl.DataFrame) -> pl.DataFrame:
    """Those of `rows` whose primary key is not in the table yet."""
    key = tables.TABLES[table].primary_key()
    if not key or rows.is_empty():
        return rows
    keys = rows.select(key)  # noqa: F841  (DuckDB reads it by name)
    present = con.execute(f"SELECT DISTINCT {', '.join(key)} FROM {table} SEMI JOIN keys USING ({', '.join(key)})").pl()
    return rows.join(present, on=key, how="anti", maintain_order="left")
