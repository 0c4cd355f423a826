"""Files that a killed writer left are deleted once they are old; what a commit knows, and what others made, stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from fake_worker import write_profile
from test_lake import record, score, teacher_row

from nbg_assets.cli import maintenance
from nbg_core.config.load import load_profile
from nbg_core.lake.lake import Lake
from nbg_core.lake.orphaned_files import KEEP_SECONDS, delete_orphaned_files
from nbg_core.lake.records import Write

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import polars as pl
from nbg_core.lake import lake as module
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Write
from test_lake import record, score, teacher_row
lake = Lake({catalog!r}, {data_path!r})
module.Lake._lineage_row = staticmethod(lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # all files are written
rows = pl.DataFrame([score(f"k{{i}}") for i in range(20)])
teacher = pl.DataFrame([teacher_row(f"k{{i}}") for i in range(20)])
lake.commit(record(), [Write("scores", rows), Write("teacher_logits", teacher, as_file=True)])
"""


@pytest.fixture
def lake(tmp_path):
    lake = Lake(f"sqlite:{tmp_path}/catalog.sqlite", str(tmp_path / "files"))
    lake.create()
    (claim,) = (tmp_path / "files" / ".catalogs").iterdir()
    os.utime(claim, (time.time() - 10 * KEEP_SECONDS,) * 2)  # the lake was made long ago
    return lake


def test_a_secret_in_the_environment_makes_no_other_claim(tmp_path, monkeypatch):
    (tmp_path / "my-secret-place").mkdir()
    catalog, data_path = f"sqlite:{tmp_path}/my-secret-place/catalog.sqlite", str(tmp_path / "files")
    Lake(catalog, data_path).create()
    monkeypatch.setenv("SOME_TOKEN", "my-secret-place")
    Path(catalog.removeprefix("sqlite:")).with_suffix(".ready").unlink()
    Lake(catalog, data_path).create()
    assert len(list((tmp_path / "files" / ".catalogs").iterdir())) == 1


def put(lake: Lake, start: str) -> None:
    rows = pl.DataFrame([score(f"{start}{i}") for i in range(20)])
    teacher = pl.DataFrame([teacher_row(f"{start}{i}") for i in range(20)])
    lake.commit(record(), [Write("scores", rows), Write("teacher_logits", teacher, as_file=True)])


def files(lake: Lake) -> set[Path]:
    return {p for p in Path(lake.data_path).rglob("*") if p.is_file() and p.suffix != ".json"}


def age(paths, days: float) -> None:
    for path in paths:
        os.utime(path, (time.time() - days * 24 * 3600,) * 2)


def kill_a_writer(lake: Lake) -> set[Path]:
    before = files(lake)
    code = KILLED.format(tests=str(Path(__file__).parent), catalog=lake.catalog, data_path=lake.data_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return files(lake) - before


def test_what_a_killed_writer_left_is_deleted_a_day_later_and_nothing_else(lake):
    put(lake, "a")
    put(lake, "b")
    replaced = Write("scores", pl.DataFrame([score("new")]), replace="slice = 'a'")  # its rows are in old snapshots
    old = lake.commit(record(), [replaced]).snapshot - 1
    known = files(lake)
    left = kill_a_writer(lake)
    assert {p.parent.name for p in left} == {"scores", "teacher_logits"}, "an insert's file and a registered one"
    half = next(p for p in left if p.parent.name == "teacher_logits").with_suffix(".tmp")
    half.write_bytes(b"half a file")
    age(known, 5)
    assert delete_orphaned_files(lake) == [], "it is young: its writer may be about to commit"
    age([*left, half], 0.9)
    assert delete_orphaned_files(lake) == []
    age([*left, half], 1.1)
    assert set(delete_orphaned_files(lake)) == {*left, half}
    assert files(lake) == known
    fresh = Lake(lake.catalog, lake.data_path)
    assert fresh.sql("SELECT count(*) FROM scores", snapshot=old).item() == 40
    assert fresh.sql("SELECT count(*), sum(len(entry_gaps)) FROM teacher_logits").row(0)[0] == 40
    assert delete_orphaned_files(fresh) == []


def test_files_of_another_catalog_in_the_same_place_stay(lake, tmp_path):
    other = Lake(f"sqlite:{tmp_path}/other.sqlite", lake.data_path)
    other.create()
    put(lake, "a")
    put(other, "b")
    age(files(lake), 5)
    for one, name in ((lake, "other.sqlite"), (other, "catalog.sqlite")):
        with pytest.raises(ValueError, match=f"{name} keeps its files in .*; give each lake a lake.data_path"):
            delete_orphaned_files(one)
    assert other.sql("SELECT count(*) FROM teacher_logits").item() == 20
    Path(other.catalog.removeprefix("sqlite:")).unlink()
    assert len(delete_orphaned_files(lake)) == 2, "that lake is gone"
    assert lake.sql("SELECT count(*) FROM teacher_logits").item() == 20


def test_files_that_were_there_before_the_lake_and_files_of_other_names_stay(lake):
    put(lake, "a")
    ours = next(p for p in files(lake) if p.parent.name == "teacher_logits")
    (other := ours.with_name("export.parquet")).write_bytes(ours.read_bytes())
    (Path(lake.data_path) / "queries").mkdir()
    (query := Path(lake.data_path) / "queries" / "a.parquet").write_bytes(b"a query file")
    (before := ours.with_name(f"{'0' * 32}-{'1' * 32}.parquet")).write_bytes(ours.read_bytes())
    age([other, query], 5)
    age([before], 20)
    assert delete_orphaned_files(lake) == []
    assert other.exists() and query.exists() and before.exists()
    age([before], 5)
    assert delete_orphaned_files(lake) == [before]


def test_a_lake_that_was_moved_with_its_files_is_alone_there(lake, tmp_path):
    put(lake, "a")
    shutil.copytree(tmp_path / "files", tmp_path / "new" / "files")
    shutil.copy2(tmp_path / "catalog.sqlite", tmp_path / "new" / "catalog.sqlite")
    moved = Lake(f"sqlite:{tmp_path}/new/catalog.sqlite", str(tmp_path / "new" / "files"))
    moved.create()
    assert delete_orphaned_files(moved) == []
    assert moved.sql("SELECT count(*) FROM teacher_logits").item() == 20


def test_the_command_deletes_them_and_says_so_or_why_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NBG_PROFILE", str(write_profile(tmp_path / "p", ("a",))))
    lake = Lake.of(load_profile())
    (claim,) = (Path(lake.data_path) / ".catalogs").iterdir()
    age([claim], 20)
    put(lake, "a")
    ours = next(p for p in files(lake) if p.parent.name == "teacher_logits")
    (left := ours.with_name(f"{'0' * 32}-{'1' * 32}.parquet")).write_bytes(ours.read_bytes())
    age([left], 5)
    other = Lake(f"sqlite:{tmp_path}/other.sqlite", lake.data_path)
    other.create()
    maintenance.compact_files()
    assert f"note: files without a commit are not deleted: sqlite:{tmp_path}/other.sqlite" in capsys.readouterr().out
    Path(other.catalog.removeprefix("sqlite:")).unlink()
    maintenance.compact_files()
    assert "1 files deleted that writers left behind" in capsys.readouterr().out
    assert not left.exists() and ours.exists()
