"""The lake: data and lineage in one transaction, snapshots, idempotence, contention."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import dataframely as dy
import duckdb
import polars as pl
import psutil
import pytest

from nbg_core.lake import catalog, conflicts, tables
from nbg_core.lake.attach import LakeError
from nbg_core.lake.joins import bounded_joins, retry_with_more_memory
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Record, Write
from nbg_core.lake.teacher_columns import GAP_ZERO, TEACHER_COLUMNS


@pytest.fixture
def lake(tmp_path):
    lake = Lake(f"sqlite:{tmp_path}/catalog.sqlite", str(tmp_path / "files"))
    lake.create()
    return lake


def score(sample: str, value: float = 1.0, slice_name: str = "a") -> dict:
    return {"slice": slice_name, "sample_id": sample, "scorer": "verifier", "scorer_id": "v", "score": value}


def record(run_id: str = "run-1", **kwargs) -> Record:
    return Record("filtered_pairs", "a", run_id, "test", **kwargs)


def test_data_and_lineage_are_one_snapshot_that_names_the_run(lake):
    before = lake.snapshot()
    commit = lake.commit(record("run-7"), [Write("scores", pl.DataFrame([score("s1"), score("s2")]))])
    assert (commit.n_rows, commit.snapshot) == (2, before + 1)
    row = lake.sql("SELECT * FROM lineage.commits").row(0, named=True)
    assert (row["run_id"], row["n_rows"], row["snapshot_id"]) == ("run-7", 2, commit.snapshot)
    assert lake.sql("SELECT DISTINCT materialisation_id FROM scores").item() == row["materialisation_id"]
    with lake.connect() as con:
        extra = con.execute(
            "SELECT commit_extra_info FROM ducklake_snapshots('lake') WHERE snapshot_id = ?", [commit.snapshot]
        ).fetchone()[0]
    assert json.loads(extra)["run_id"] == "run-7"


def test_a_commit_that_fails_halfway_changes_nothing(lake):
    before = lake.snapshot()
    good = Write("scores", pl.DataFrame([score("s1")]))
    bad = Write("scores", pl.DataFrame([score("s2")]), replace="no_such_column = 1")
    with pytest.raises(duckdb.Error, match="no_such_column"):
        lake.commit(record(), [good, bad])
    assert lake.snapshot() == before
    assert lake.sql("SELECT * FROM scores").is_empty()
    assert lake.sql("SELECT * FROM lineage.materialisations").is_empty()


def test_a_frame_that_breaks_its_contract_is_refused_before_anything_is_written(lake):
    with pytest.raises(dy.exc.ValidationError, match="sample_id"):
        lake.commit(record(), [Write("scores", pl.DataFrame([score("")]))])
    assert lake.sql("SELECT * FROM lineage.materialisations").is_empty()


def test_rows_already_there_are_left_alone(lake):
    lake.commit(record("first"), [Write("scores", pl.DataFrame([score("s1", 0.25)]))])
    again = lake.commit(record("second"), [Write("scores", pl.DataFrame([score("s1", 0.75), score("s2", 0.5)]))])
    assert again.n_rows == 1
    assert dict(lake.sql("SELECT sample_id, score FROM scores").iter_rows()) == {"s1": 0.25, "s2": 0.5}


def test_replace_swaps_a_partition_and_a_snapshot_still_has_the_old_one(lake):
    other = Write("scores", pl.DataFrame([score("o", slice_name="b")]))
    old = lake.commit(record(), [Write("scores", pl.DataFrame([score("s1"), score("s2")])), other])
    lake.commit(record(), [Write("scores", pl.DataFrame([score("s3")]), replace="slice = ?", params=("a",))])
    assert lake.sql("SELECT sample_id FROM scores ORDER BY ALL")["sample_id"].to_list() == ["o", "s3"]
    past = lake.sql("SELECT sample_id FROM scores ORDER BY ALL", snapshot=old.snapshot)
    assert past["sample_id"].to_list() == ["o", "s1", "s2"]


def test_frames_of_a_function_are_one_commit_and_a_bad_one_undoes_all(lake):
    def frames(last: str):
        yield pl.DataFrame([score("s1"), score("s2")])
        yield pl.DataFrame([score("s2"), score(last)])

    before = lake.snapshot()
    with pytest.raises(dy.exc.ValidationError, match="sample_id"):
        lake.commit(record(), [Write("scores", lambda: frames(""))])
    assert lake.snapshot() == before and lake.sql("FROM lineage.materialisations").is_empty()
    commit = lake.commit(record(), [Write("scores", lambda: frames("s3"))])
    assert (commit.n_rows, commit.snapshot) == (3, before + 1)
    assert lake.sql("SELECT sample_id FROM scores ORDER BY ALL")["sample_id"].to_list() == ["s1", "s2", "s3"]


def teacher_row(sample: str) -> dict:
    gaps = [GAP_ZERO + gap for gap in (1.0, 1.0, 7.0, 2.0, 4.0)]
    others = {column.name: [0] * (2 if column.per == "position" else len(gaps)) for column in TEACHER_COLUMNS}
    return others | {
        "slice": "a", "sample_id": sample, "model_id": "m", "settings_id": "x",
        "token_logprobs": [-0.5, -0.1], "tail_logmass": [-5.0, float("-inf")], "head_counts": [2, 1],
        "tail_counts": [2, 0], "entry_gaps": gaps, "entry_logprobs": [-0.5, -1.0, -6.0, -6.5, 0.0],
    }  # fmt: skip


def test_registered_files_are_rows_like_any_other_and_expand_in_sql(lake, tmp_path):
    rows = pl.DataFrame([teacher_row("s1"), teacher_row("s2")])
    assert lake.commit(record(), [Write("teacher_logits", rows, as_file=True)]).n_rows == 2
    again = pl.DataFrame([teacher_row("s2"), teacher_row("s3")])
    assert lake.commit(record(), [Write("teacher_logits", again, as_file=True)]).n_rows == 1
    assert len(list((tmp_path / "files" / "registered").rglob("*.parquet"))) == 2
    entries = lake.sql("SELECT * FROM teacher_entries WHERE sample_id = 's3' ORDER BY position, is_head DESC, token_id")
    assert entries["position"].to_list() == [0, 0, 0, 0, 1]
    assert entries["token_id"].to_list() == [1, 2, 7, 9, 4]
    expected = [2.718281828**-0.5, 2.718281828**-1, 2.718281828**-5 / 2, 2.718281828**-5 / 2, 1.0]
    assert entries["weight"].to_list() == pytest.approx(expected, rel=1e-5)


def test_a_failed_commit_leaves_no_file(lake, tmp_path):
    file = Write("teacher_logits", pl.DataFrame([teacher_row("s1")]), as_file=True)
    bad = Write("scores", pl.DataFrame([score("s2")]), replace="no_such_column = 1")
    with pytest.raises(duckdb.Error):
        lake.commit(record(), [file, bad])
    assert not list((tmp_path / "files").rglob("*.parquet"))


def _commit_many(catalog: str, data_path: str, who: int, n: int, start) -> None:
    lake = Lake(catalog, data_path)
    start.wait()
    for i in range(n):
        rows = pl.DataFrame([score(f"{who}-{i}", slice_name=f"w{who}")])
        lake.commit(record(f"{who}"), [Write("scores", rows, replace="sample_id = ?", params=(f"{who}-{i}",))])


def test_four_processes_committing_at_once_lose_nothing(lake):
    context = multiprocessing.get_context("spawn")
    start, n = context.Barrier(4), 6
    workers = [
        context.Process(target=_commit_many, args=(lake.catalog, lake.data_path, who, n, start)) for who in range(4)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join(180)
    assert [w.exitcode for w in workers] == [0] * 4
    found = set(lake.sql("SELECT sample_id FROM scores")["sample_id"])
    assert found == {f"{who}-{i}" for who in range(4) for i in range(n)}
    assert lake.sql("SELECT count(*) FROM lineage.materialisations").item() == 4 * n


@pytest.mark.parametrize("where", ["COMMIT", "SELECT snapshot_id"])
def test_a_lock_met_after_the_commit_does_not_commit_twice(lake, monkeypatch, where):
    """SQLite may say that it is locked when the rows are already in."""
    real, locked = Lake.connect, []

    class Locked:
        def __init__(self, con):
            self.con = con.execute("SET python_scan_all_frames = true")  # frames are found above this class's, too

        def __getattr__(self, name):
            return getattr(self.con, name)

        def execute(self, query, *params):
            result = self.con.execute(query, *params)
            if where in query and not locked:
                locked.append(query)
                raise duckdb.IOException("IO Error: database is locked")
            return result

    monkeypatch.setattr(Lake, "connect", lambda self, **kwargs: Locked(real(self, **kwargs)))
    before = lake.snapshot() if where == "COMMIT" else 0
    file = Write("teacher_logits", pl.DataFrame([teacher_row("s1"), teacher_row("s2")]), as_file=True)
    commit = lake.commit(record(), [file])
    assert locked and commit.n_rows == 2
    assert lake.sql("SELECT count(*) FROM lineage.materialisations").item() == 1
    assert lake.sql("SELECT count(*) FROM teacher_logits").item() == 2
    assert commit.snapshot == lake.snapshot() and commit.snapshot > before


def test_a_reader_sees_what_others_commit_after_it_opened(lake):
    assert lake.sql("SELECT * FROM scores").is_empty()
    Lake(lake.catalog, lake.data_path).commit(record(), [Write("scores", pl.DataFrame([score("s1")]))])
    assert lake.sql("SELECT count(*) FROM scores").item() == 1


def test_sql_for_people_cannot_write(lake):
    with pytest.raises(duckdb.Error, match="read-only"):
        lake.sql("DELETE FROM scores")


def test_a_join_goes_to_disk_in_a_folder_that_is_made_and_removed(lake, tmp_path):
    spill = tmp_path / "work" / "training" / "spill"
    with bounded_joins(lake, lake.snapshot(), spill) as con:
        con.execute("SET memory_limit = '30MB'")
        batches = con.execute("SELECT i FROM range(2_000_000) t(i) ORDER BY hash(i)").to_arrow_reader(65536)
        assert next(iter(batches)).num_rows and list(spill.iterdir())
    assert not spill.exists() and spill.parent.exists()


def test_a_query_gets_more_memory_until_there_is_no_more(lake, tmp_path):
    limits = []

    def attempt() -> str:
        limits.append(con.execute("SELECT current_setting('memory_limit')").fetchone()[0])
        return con.execute("SELECT len(list(i)) FROM range(3_000_000) t(i)").fetchone()[0]

    with bounded_joins(lake, lake.snapshot(), tmp_path / "spill") as con:
        assert retry_with_more_memory(con, attempt, 8 << 20) == 3_000_000
        assert limits[0] == "8.0 MiB" and limits[-1] in ("32.0 MiB", "128.0 MiB")
        with pytest.raises(ZeroDivisionError):
            retry_with_more_memory(con, lambda: 1 / 0)
        with pytest.raises(duckdb.TransactionException, match="no transaction is active"):
            retry_with_more_memory(con, lambda: con.execute("COMMIT"), 8 << 20)


@pytest.mark.parametrize(
    "error",
    [
        duckdb.OutOfMemoryException("Out of Memory Error: could not allocate block"),
        OSError("Out of Memory Error: as Arrow passes it on"),
        duckdb.TransactionException("Failed to get data file list from DuckLake: Current transaction is aborted"),
    ],
    ids=["DuckDB", "Arrow", "DuckLake"],
)
def test_every_way_of_saying_that_memory_is_short_gets_more_or_ends_with_what_to_do(lake, tmp_path, monkeypatch, error):
    limits, enough = [], "1.0 GiB"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 30))

    def attempt() -> str:
        limits.append(con.execute("SELECT current_setting('memory_limit')").fetchone()[0])
        if limits[-1] != enough:
            raise error
        return "done"

    with bounded_joins(lake, lake.snapshot(), tmp_path / "spill") as con:
        assert retry_with_more_memory(con, attempt, 64 << 20) == "done"
        assert limits == ["64.0 MiB", "256.0 MiB", "1.0 GiB"]
        enough = "2.0 GiB"
        with pytest.raises(LakeError, match="more than 1024 MiB of memory, and 2048 MiB are free; end other programs"):
            retry_with_more_memory(con, attempt, 64 << 20)


def test_a_reader_is_not_blocked_by_an_open_write_transaction(lake):
    lake.commit(record(), [Write("scores", pl.DataFrame([score("s1")]))])
    with lake.connect(read_only=False) as con:
        con.execute("BEGIN")
        con.execute("DELETE FROM scores")
        began = time.monotonic()
        assert lake.sql("SELECT count(*) FROM scores").item() == 1
        assert time.monotonic() - began < 5
        con.execute("ROLLBACK")


@pytest.mark.parametrize("table", tables.TABLES)
def test_every_table_takes_an_empty_frame_and_describes_its_columns(lake, table):
    assert tables.validate(table, pl.DataFrame(schema=tables.polars_schema(table))).is_empty()
    columns = lake.sql(f"DESCRIBE {table}")
    described = dict(zip(columns["column_name"], columns["column_type"], strict=True))
    for name, column in tables.TABLES[table].columns().items():
        assert column.description, f"{table}.{name} says nothing"
        wanted = tables.sql_type(column.dtype).replace("TIMESTAMPTZ", "TIMESTAMP WITH TIME ZONE").replace("STRUCT", "")
        assert described[name].replace('"', "").replace("STRUCT", "") == wanted


def test_a_lake_whose_folder_was_moved_still_opens_and_one_without_its_files_says_so(tmp_path):
    def opened(folder, files="files") -> Lake:
        lake = Lake(f"sqlite:{folder}/catalog.sqlite", str(folder / files))
        lake.create()
        return lake

    old, new = tmp_path / "old", tmp_path / "new"
    row = {"slice": "a", "sample_id": "s1", "model_id": "m", "settings_id": "x", "token_logprobs": [-0.5]}
    rows = pl.DataFrame([row])
    lake = opened(old)
    lake.commit(record(), [Write("reference_logprobs", rows, as_file=True)])
    lake.commit(record(), [Write("scores", pl.DataFrame([score("s1")]))])
    old.rename(new)
    moved = opened(new)
    assert moved.sql("SELECT token_logprobs FROM reference_logprobs").item().to_list() == [-0.5]
    assert moved.sql("SELECT score FROM scores").item() == 1.0
    assert moved.commit(record(), [Write("scores", pl.DataFrame([score("s2")]))]).n_rows == 1
    with pytest.raises(LakeError, match=r"made with its files in .*move the files there, or set lake.data_path"):
        opened(new, "elsewhere")
    assert opened(new).sql("SELECT count(*) FROM scores").item() == 2


def test_a_catalog_that_does_not_open_shows_no_password(tmp_path, monkeypatch):
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "2")
    lake = Lake("postgres:host=127.0.0.1 port=1 dbname=x user=me password=s3cretpw", str(tmp_path / "files"))
    with pytest.raises(LakeError, match=r"(?s)password=\*\*\*.* cannot be opened.*check lake.catalog") as e:
        lake.sql("SELECT 1")
    assert "s3cretpw" not in "".join(traceback.format_exception(e.value))


READ_ONLY = """
import sys
import polars as pl
import psutil
from nbg_core.lake.attach import LakeError
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Record, Write
folder, act = sys.argv[1:]
lake = Lake(f"sqlite:{folder}/catalog.sqlite", f"{folder}/files")
try:
    lake.create()
    if act == "read":
        print(lake.sql("SELECT count(*) AS n FROM scores").item())
    else:
        lake.commit(Record("filtered_pairs", "a", "r", "t"), [Write("scores", pl.DataFrame([%r]))])
except LakeError as e:
    print("LakeError:", e)
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become another user")
@pytest.mark.parametrize("act", ["read", "write", "create"])
def test_a_folder_that_may_only_be_read_is_named_with_a_remedy(act):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        place, home = Path(folder, "lake"), Path(folder, "home")
        home.mkdir(mode=0o777)
        home.chmod(0o777)
        if act == "create":
            place.mkdir()
        else:
            lake = Lake(f"sqlite:{place}/catalog.sqlite", str(place / "files"))
            lake.create()
            lake.commit(record(), [Write("scores", pl.DataFrame([score("s1")]))])
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c"]
        out = subprocess.run(
            [*command, READ_ONLY % score("s2"), str(place), act], capture_output=True, text=True, timeout=60,
            env={**os.environ, "HOME": str(home)},
        )  # fmt: skip
    assert out.stdout.startswith("LakeError: the lake at sqlite:"), out.stdout + out.stderr
    assert f"make {place} and {place}/files writable for this user" in out.stdout and "set `lake`" in out.stdout


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("IO Error: database is locked", True),
        ("Failed to commit DuckLake transaction: Transaction conflict - attempting to insert", True),
        ("ERROR: could not serialize access due to concurrent update", True),
        ("Invalid Input Error: cannot decode block 7", False),
        ("Out of Range Error: clock moved", False),
    ],
)
def test_only_another_writer_is_waited_for(message, expected):
    assert conflicts.is_conflict(duckdb.IOException(message)) is expected
    assert not conflicts.is_conflict(duckdb.BinderException('column "lock" not found'))


def test_tables_that_another_process_makes_at_the_same_time_are_waited_for(tmp_path, monkeypatch):
    calls = []

    def create_tables(self):
        calls.append(self)
        if len(calls) < 3:
            raise duckdb.TransactionException("Transaction conflict: schema already made")

    monkeypatch.setattr(catalog, "create_tables", create_tables)
    Lake("postgres:host=nowhere", str(tmp_path)).create()
    assert len(calls) == 3


def test_a_registered_file_and_inserted_rows_are_both_found_by_id(lake):
    """DuckLake skips what is out of a table's known bounds: a registered file must have its own."""
    lake.commit(
        record(), [Write("teacher_logits", pl.DataFrame([teacher_row(f"s{i}") for i in range(9)]), as_file=True)]
    )
    lake.commit(record(), [Write("teacher_logits", pl.DataFrame([teacher_row("s5")]), "sample_id = ?", ("s5",))])
    for i in range(9):
        assert lake.sql("SELECT count(*) FROM teacher_logits WHERE sample_id = ?", [f"s{i}"]).item() == 1, i
