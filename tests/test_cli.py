"""The `nbg` command, as a user runs it."""

import json
import subprocess
import sys

import polars as pl
import pytest
import yaml

from nbg_core.lake import Lake, Record, Write


@pytest.fixture
def profile(make_profile, tmp_path, monkeypatch):
    profile = make_profile()
    path = tmp_path / "cli.yaml"
    path.write_text(yaml.safe_dump(json.loads(profile.model_dump_json())))
    monkeypatch.setenv("NBG_PROFILE", str(path))
    return profile


def nbg(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "nbg_assets.cli", *args], capture_output=True, text=True, timeout=120)


def add_pair(profile) -> None:
    row = {"slice": "a", "pair_id": "p1", "query_id": "q1", "chosen_id": "s1", "rejected_id": "s2", "chosen_score": 1.0,
           "rejected_score": 0.0, "margin": 1.0}  # fmt: skip
    Lake.of(profile).commit(Record("filtered_pairs", "a", "r", "t"), [Write("pairs", pl.DataFrame([row]))])


def test_sql_in_three_formats(profile):
    add_pair(profile)
    query = "SELECT pair_id, margin, [1, 2] AS l FROM pairs"
    table, rows, csv = (nbg("sql", query, *extra) for extra in ([], ["--format", "json"], ["--format", "csv"]))
    assert "p1" in table.stdout and "1 rows" in table.stdout
    assert json.loads(rows.stdout) == [{"pair_id": "p1", "margin": 1.0, "l": [1, 2]}]
    assert csv.stdout.splitlines() == ["pair_id,margin,l", 'p1,1.0,"[1, 2]"']


def test_sql_cannot_write_and_names_its_mistakes(profile):
    add_pair(profile)
    for query, expected in [("DELETE FROM pairs", "read-only"), ("SELECT x FROM pairs", '"x" not found')]:
        result = nbg("sql", query)
        assert (result.returncode, result.stderr) == (1, "")
        assert expected in result.stdout
        assert "Traceback" not in result.stdout


def test_sql_at_a_snapshot(profile):
    before = Lake.of(profile).snapshot()
    add_pair(profile)
    result = nbg("sql", "SELECT count(*) AS n FROM pairs", "--format", "json", "--snapshot", str(before))
    assert json.loads(result.stdout) == [{"n": 0}]


def test_an_unknown_profile_key_is_one_line(profile, tmp_path, monkeypatch):
    bad = tmp_path / "bad.yaml"
    bad.write_text("models: {student: a, teacher: b}\nsamplign: {}\n")
    monkeypatch.setenv("NBG_PROFILE", str(bad))
    result = nbg("status")
    assert result.returncode == 1
    assert "unknown key 'samplign'; did you mean 'sampling'" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_status_of_a_new_project(profile):
    (profile.resolve(profile.paths.queries) / "a.jsonl").write_text('{"prompt": "x"}\n')
    result = nbg("status")
    assert result.returncode == 0
    assert result.stdout.count("never materialised") == 7


def test_a_missing_model_folder_is_named(profile, tmp_path, monkeypatch):
    data = json.loads(profile.model_dump_json())
    data["models"]["student"] = str(tmp_path / "nowhere")
    path = tmp_path / "gone.yaml"
    path.write_text(yaml.safe_dump(data))
    monkeypatch.setenv("NBG_PROFILE", str(path))
    result = nbg("status")
    assert result.returncode == 1
    assert f"no model at {tmp_path / 'nowhere'}" in result.stdout.replace("\n", "")


def test_trace_and_report_say_when_there_is_nothing(profile):
    assert "starts with 'abc'" in nbg("trace", "abc").stdout
    assert "nothing is evaluated yet" in nbg("report").stdout


def test_tables_explain_every_table(profile):
    out = nbg("tables").stdout
    for name in ("queries", "samples", "scores", "pairs", "rejections", "teacher_logits", "lineage.materialisations"):
        assert f"{name}: 0 rows" in out
