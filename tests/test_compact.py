"""Compaction: fewer files, and the same rows at every snapshot."""

import polars as pl
import pytest
from test_lake import lake, record, score, teacher_row  # noqa: F401  (the fixture is found by name)

from nbg_core.lake import compact as compaction
from nbg_core.lake.compact import compact
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Write

TABLES = ("scores", "teacher_logits", "lineage.materialisations")


def files(lake: Lake) -> dict[str, int]:  # noqa: F811
    count = "SELECT count(*) FROM ducklake_list_files('lake', ?)"
    return {t: lake.sql(count, [t]).item() for t in ("scores", "teacher_logits")}


def seen(lake: Lake, snapshots: list[int]) -> dict[tuple, pl.DataFrame]:  # noqa: F811
    """All rows with their ids at each snapshot, and what each snapshot inserted and deleted."""
    rows = {(s, t): lake.sql(f"SELECT rowid, * FROM {t} ORDER BY ALL", snapshot=s) for s in snapshots for t in TABLES}
    for change in ("insertions", "deletions"):
        for t in ("scores", "teacher_logits"):
            query = f"FROM ducklake_table_{change}('lake', 'main', '{t}', 0, {snapshots[-1]}) ORDER BY ALL"
            rows[change, t] = lake.sql(query)
    return rows


@pytest.mark.parametrize("keep", ["1 day", "0 seconds"])
def test_compaction_leaves_fewer_files_and_every_snapshot_as_it_was(lake, monkeypatch, tmp_path, keep):  # noqa: F811
    snapshots = []
    for i in range(5):
        rows = pl.DataFrame([score(f"s{i}-{j}") for j in range(20)])
        teacher = pl.DataFrame([teacher_row(f"s{i}-{j}") for j in range(20)])
        writes = [Write("scores", rows), Write("teacher_logits", teacher, as_file=True)]
        snapshots.append(lake.commit(record(), writes).snapshot)
    change = Write("scores", pl.DataFrame([score("s2-0", 0.5)]), replace="sample_id = 's2-0'")
    snapshots.append(lake.commit(record(), [change]).snapshot)
    before, were, on_disk = files(lake), seen(lake, snapshots), len(list(tmp_path.rglob("*.parquet")))
    monkeypatch.setattr(compaction, "KEEP", keep)
    report = compact(lake)
    assert report["table"].to_list() == ["scores"] and report["after"].item() < report["before"].item()
    after = files(lake)
    assert after["scores"] < before["scores"] == 5 and after["teacher_logits"] == before["teacher_logits"] == 5
    assert (len(list(tmp_path.rglob("*.parquet"))) < on_disk) == (keep == "0 seconds")
    fresh = Lake(lake.catalog, lake.data_path)
    assert seen(fresh, snapshots).keys() == were.keys()
    for what, rows in seen(fresh, snapshots).items():
        assert rows.equals(were[what]), what
    newest = fresh.snapshot()
    assert compact(fresh).is_empty() and fresh.snapshot() == newest, "there is nothing left to do"
    assert fresh.commit(record(), [Write("scores", pl.DataFrame([score("s2-0"), score("new")]))]).n_rows == 1
