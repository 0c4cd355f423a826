"""The one door to the lake: DuckLake tables that change only together with their lineage.

`Lake.sql` reads, now or at a snapshot; `Lake.commit` writes rows and their `lineage.materialisations` row in one
transaction, whose snapshot carries the Dagster run id in its commit message. A commit that meets another writer is
retried whole. Readers never block writers.

From plain DuckDB: `ATTACH 'ducklake:sqlite:data/lake/catalog.sqlite' AS lake (READ_ONLY)`.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TypeVar

import duckdb
import polars as pl
import psutil
from duckdb_extensions import import_extension
from filelock import FileLock
from tenacity import retry, retry_if_exception, stop_after_delay, wait_random_exponential

from nbg_core.base.errors import redact
from nbg_core.base.files import write_parquet
from nbg_core.base.ids import digest
from nbg_core.config import identity
from nbg_core.config.profile import Profile
from nbg_core.lake import tables
from nbg_core.lake.claims import claim

T = TypeVar("T")

RETRY_SECONDS = 120

JOIN_MEMORY = 200 << 20
"""Bytes that DuckDB may use to join tables that do not fit into memory."""

VIEWS = {
    "teacher_entries": """
        WITH p AS (
          SELECT sample_id, model_id, settings_id, slice, unnest(range(len(head_counts))) AS position,
                 unnest(head_counts) AS n_head, unnest(tail_counts) AS n_tail, unnest(tail_logmass) AS logmass
          FROM {lake}.teacher_logits),
        owners AS (
          SELECT *, unnest(range(n_head + n_tail)) AS i FROM p),
        o AS (
          SELECT *, i < n_head AS is_head,
                 row_number() OVER (PARTITION BY sample_id, model_id, settings_id ORDER BY position, i) AS entry
          FROM owners),
        e AS (
          SELECT sample_id, model_id, settings_id, unnest(range(1, len(entry_gaps) + 1)) AS entry,
                 unnest(entry_gaps) AS gap, unnest(entry_logprobs) AS logprob
          FROM {lake}.teacher_logits)
        SELECT sample_id, model_id, settings_id, slice, position, is_head,
               (sum(gap - {zero}) OVER (PARTITION BY sample_id, model_id, settings_id, position, is_head ORDER BY i)
                 )::INTEGER AS token_id,
               logprob, CASE WHEN is_head THEN exp(logprob) ELSE exp(logmass) / n_tail END AS weight
        FROM o JOIN e USING (sample_id, model_id, settings_id, entry)""",
    "lineage.commits": """
        SELECT m.*, m.snapshot_id, s.snapshot_time
        FROM {lake}.lineage.materialisations m
        LEFT JOIN ducklake_snapshots('{lake}') s ON s.snapshot_id = m.snapshot_id""",
}


_MEDIUM = re.compile(r"readonly|read-only|IO Error|disk is full|No space", re.IGNORECASE)
"""What DuckDB and SQLite say when the disk is the problem, not the statement."""


class LakeError(RuntimeError):
    """The lake cannot be opened or written: names the place and the remedy."""


@dataclass(frozen=True)
class Input:
    """What a materialisation read: an upstream partition's content and the snapshot it was read at."""

    asset: str
    slice_name: str | None
    data_version: str
    snapshot: int

    def as_json(self) -> dict:
        """As `lineage.materialisations.inputs` holds it."""
        return {
            "asset": self.asset,
            "slice": self.slice_name,
            "data_version": self.data_version,
            "snapshot": self.snapshot,
        }


@dataclass(frozen=True)
class Record:
    """The lineage of one commit. `settings` are those that matter to the asset, nothing else."""

    asset: str
    slice_name: str | None
    run_id: str
    profile: str
    status: str = "complete"
    settings: dict = field(default_factory=dict)
    settings_id: str = "none"
    inputs: Sequence[Input] = ()
    data_version: str | None = None
    materialisation_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Write:
    """Rows for one table, without `materialisation_id` (the commit adds it).

    Rows whose primary key is already there are left as they are, unless `replace` is given: an SQL condition
    (with `params`) whose rows are deleted first. `as_file` writes Parquet beside the lake's own files and registers
    it, for tables with large arrays; in an object store it is an insert like the others, whose files are larger.

    Rows that do not fit in memory at once come from a function that gives them frame by frame; it is called again when
    the commit is retried."""

    table: str
    rows: pl.DataFrame | Callable[[], Iterable[pl.DataFrame]]
    replace: str | None = None
    params: tuple = ()
    as_file: bool = False


@dataclass(frozen=True)
class Commit:
    materialisation_id: str
    snapshot: int
    n_rows: int


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
        lake._create()
        return lake

    def connect(self, *, read_only: bool = True, snapshot: int | None = None) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection whose default catalog is the lake, optionally as it was at `snapshot`.

        Close it after use. Attaching costs 0.1 s, so a process attaches once per mode and hands out connections."""
        key = (read_only, snapshot)
        if key not in self._attached:
            if snapshot is not None:  # one past snapshot is enough to keep
                for old in [k for k in self._attached if k[1] is not None]:
                    self._attached.pop(old).close()
            self._attached[key] = self._attach(read_only, snapshot)
        con = self._attached[key].cursor()
        con.execute("USE lake")
        con.execute("SET TimeZone = 'UTC'")
        return con

    def _attach(self, read_only: bool, snapshot: int | None) -> duckdb.DuckDBPyConnection:
        kind = self.catalog.partition(":")[0]
        options = [f"DATA_PATH '{_quoted(self.data_path)}'"]
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
            con.execute(f"ATTACH 'ducklake:{_quoted(self.catalog)}' AS lake ({', '.join(options)})")
        except duckdb.Error as e:  # its text holds the connection string: it may not be shown, nor be a cause
            con.close()
            if _is_contention(e):
                raise
            if snapshot is not None and "No snapshot found" in str(e):
                raise LookupError(f"the lake has no snapshot {snapshot}; the newest is {self.snapshot()}") from None
            raise self._error("opened", e) from None
        return con

    def _error(self, what: str, error: Exception) -> LakeError:
        """The sentence for a user: place, cause without secrets, remedy."""
        kind, _, where = self.catalog.partition(":")
        if kind == "sqlite":
            folders = f"{Path(where).parent} and {self.data_path}"
            remedy = f"{folders} must be writable for this user, for reading too (SQLite keeps files of its own beside "
            remedy += "the catalog): make them so, or set `lake` in the profile to a folder that is"
        else:
            remedy = "check lake.catalog in the profile, and that the database is up and lets this user in"
        return LakeError(redact(f"the lake at {self.catalog} cannot be {what}: {error}; {remedy}"))

    def sql(self, query: str, params: Sequence = (), *, snapshot: int | None = None) -> pl.DataFrame:
        """The rows of a read-only query, at `snapshot` if given. Lists and structs come as polars types."""
        with self._connection(read_only=True, snapshot=snapshot) as con:
            return con.execute(query, list(params)).pl()

    @contextmanager
    def joins(self, snapshot: int, spill: Path) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection for joins of large tables that stay within JOIN_MEMORY: what does not fit goes to the folder
        `spill`, which is removed at the end. A query names the smaller table last; without ORDER BY its rows come in
        any order. `with_room` is for those that need more."""
        shutil.rmtree(spill, ignore_errors=True)  # of one that was killed
        spill.parent.mkdir(parents=True, exist_ok=True)  # DuckDB makes the folder alone
        con = self._attach(True, snapshot)
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

    def snapshot(self) -> int:
        """The newest snapshot id."""
        with self._connection(read_only=True) as con:
            return con.execute("SELECT max(snapshot_id) FROM ducklake_snapshots('lake')").fetchone()[0]

    def commit(self, record: Record, writes: Sequence[Write] = ()) -> Commit:
        """Write `writes` and their lineage in one transaction; retried whole while other writers are in the way.

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
        except (duckdb.Error, OSError) as e:  # a folder that is read-only, a disk that is full
            if isinstance(e, duckdb.Error) and not _MEDIUM.search(str(e)):
                raise
            raise self._error("written", e) from None

    def _try_commit(self, record: Record, ready: list[tuple[Write, Frames]]) -> int:
        files: list[Path] = []
        with self._connection(read_only=False) as con:
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
                quietly_rollback(con)
                # An interrupt can come after the commit, before its return.
                if files and retry_on_conflict(self._landed, record) is None:
                    for path in files:
                        path.unlink(missing_ok=True)
                raise
        return n_rows

    def _snapshot_of(self, record: Record) -> int:
        with self._connection(read_only=False) as con:  # it is attached already
            return con.execute(
                "SELECT max(snapshot_id) FROM ducklake_snapshots('lake') "
                "WHERE json_extract_string(commit_extra_info, '$.materialisation_id') = ?",
                [record.materialisation_id],
            ).fetchone()[0]

    def _landed(self, record: Record) -> int | None:
        """The rows that a commit has written, None if it is not in the lake."""
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
    def _connection(self, **kwargs):
        con = self.connect(**kwargs)
        try:
            yield con
        finally:
            con.close()

    def _create(self) -> None:
        """Make catalog, tables and views where they are missing.

        One process at a time in a SQLite catalog; in a Postgres one, whoever comes second tries again."""
        kind, _, where = self.catalog.partition(":")
        try:
            if "://" not in self.data_path:
                Path(self.data_path).mkdir(parents=True, exist_ok=True)
            claim(self.catalog, self.data_path)
            if kind == "sqlite":
                self._create_file(Path(where))
            else:
                retry_on_conflict(self._create_tables)
        except (OSError, sqlite3.Error) as e:
            raise self._error("created", e) from None

    def _create_file(self, catalog: Path) -> None:
        ready = catalog.with_suffix(".ready")  # holds the data path and what the tables look like
        wanted = f"{self.data_path}\n{tables.version()} {digest(VIEWS)}"
        if catalog.exists() and ready.exists() and ready.read_text() == wanted:
            return
        catalog.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(catalog.with_suffix(".lock")):
            if catalog.exists():
                self._follow_move(catalog)
            self._create_tables()
            temporary = ready.with_suffix(".tmp")
            temporary.write_text(wanted)
            temporary.rename(ready)

    def _follow_move(self, catalog: Path) -> None:
        """A catalog holds absolute paths: when its folder was moved or copied, point it at the files' new place."""
        with closing(sqlite3.connect(catalog, timeout=10)) as con, con:
            known = con.execute("SELECT 1 FROM sqlite_master WHERE name = 'ducklake_metadata'").fetchone()
            old = known and con.execute("SELECT value FROM ducklake_metadata WHERE key = 'data_path'").fetchone()
            if not old or Path(old[0]) == Path(self.data_path):
                return
            old, new = old[0].rstrip("/") + "/", self.data_path.rstrip("/") + "/"
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

    def _create_tables(self) -> None:
        with self._connection(read_only=False) as con:
            con.execute("BEGIN")
            con.execute("CREATE SCHEMA IF NOT EXISTS lineage")
            for table in tables.TABLES:
                columns = {n: tables.sql_type(t) for n, t in tables.polars_schema(table).items()}
                made = ", ".join(f"{n} {t}" for n, t in columns.items())
                con.execute(f"CREATE TABLE IF NOT EXISTS {table} ({made})")
                there = {name for name, *_ in con.execute(f"DESCRIBE {table}").fetchall()}
                # Made by an earlier version: its rows were made with other settings, and are not read.
                for n in columns.keys() - there:
                    con.execute(f"ALTER TABLE {table} ADD COLUMN {n} {columns[n]}")
            for name, body in VIEWS.items():
                con.execute(f"CREATE OR REPLACE VIEW {name} AS {body.format(lake='lake', zero=tables.GAP_ZERO)}")
            con.execute("COMMIT")
            # Small inserts go into the catalog as text, where a brace in a struct's text makes the table unreadable.
            con.execute("CALL lake.set_option('data_inlining_row_limit', 0, table_name => 'queries')")


def with_room(con: duckdb.DuckDBPyConnection, attempt: Callable[[], T], memory: int = JOIN_MEMORY) -> T:
    """`attempt()` within `memory` bytes of DuckDB's, else again with more: it reads 2,048 rows of a file at once,
    however long they are, and not all that it does can go to disk.

    Raises LakeError when the machine has no more."""
    while True:
        try:
            con.execute(f"SET memory_limit = '{memory}B'")
            return attempt()
        except (duckdb.OutOfMemoryException, OSError) as e:  # Arrow makes the latter of the former
            if "Out of Memory" not in str(e):
                raise
            if 4 * memory > (free := psutil.virtual_memory().available):
                raise LakeError(
                    f"joining the lake's tables needs more than {memory >> 20} MiB of memory, and {free >> 20} MiB are "
                    "free; end other programs, or train on fewer slices"
                ) from e
            memory *= 4


Frames = Callable[[], Iterable[pl.DataFrame]]


def _checked(write: Write, record: Record) -> Frames:
    """The frames of a write with their `materialisation_id`, held to the table's contract: a single one at once."""

    def check(rows: pl.DataFrame) -> pl.DataFrame:
        return tables.validate(write.table, rows.with_columns(materialisation_id=pl.lit(record.materialisation_id)))

    if callable(write.rows):
        return lambda: map(check, write.rows())
    rows = check(write.rows)
    return lambda: [rows]


def _without_present(con, table: str, rows: pl.DataFrame) -> pl.DataFrame:
    """`rows` whose primary key is not in the table yet."""
    key = tables.TABLES[table].primary_key()
    if not key or rows.is_empty():
        return rows
    keys = rows.select(key)  # noqa: F841  (DuckDB reads it by name)
    present = con.execute(f"SELECT DISTINCT {', '.join(key)} FROM {table} SEMI JOIN keys USING ({', '.join(key)})").pl()
    return rows.join(present, on=key, how="anti", maintain_order="left")


_CONTENTION = re.compile(r"\b(lock|locked|deadlock|busy|conflict|conflicts|conflicting|serialize)\b", re.IGNORECASE)


def _is_contention(error: BaseException) -> bool:
    """Whether another writer was in the way and the transaction can simply be tried again."""
    mistakes = (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException)  # may name any word
    return isinstance(error, duckdb.Error) and not isinstance(error, mistakes) and bool(_CONTENTION.search(str(error)))


def retry_on_conflict(attempt, *args):
    """`attempt(*args)`, again and again while other writers are in the way, for RETRY_SECONDS at most."""
    return retry(
        retry=retry_if_exception(_is_contention),
        wait=wait_random_exponential(multiplier=0.05, max=5),
        stop=stop_after_delay(RETRY_SECONDS),
        reraise=True,
    )(attempt)(*args)


def quietly_rollback(con) -> None:
    try:
        con.execute("ROLLBACK")
    except duckdb.Error:  # a failed COMMIT has already ended the transaction
        pass


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
