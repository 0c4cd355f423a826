"""The `nbg` command, as a user runs it."""

import contextlib
import csv
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import pytest
import yaml
from fake_worker import write_profile
from filelock import FileLock, Timeout
from typer.testing import CliRunner

from nbg_assets import assets, driver
from nbg_assets.cli import maintenance, sql
from nbg_assets.cli.main import app
from nbg_core.assets import ASSETS
from nbg_core.base.files import hold
from nbg_core.config.profile import PROJECT_ROOT
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Record, Write


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
    table, rows, as_csv = (nbg("sql", query, *extra) for extra in ([], ["--format", "json"], ["--format", "csv"]))
    assert "p1" in table.stdout and "1 rows" in table.stdout
    assert json.loads(rows.stdout) == [{"pair_id": "p1", "margin": 1.0, "l": [1, 2]}]
    assert as_csv.stdout.splitlines() == ["pair_id,margin,l", 'p1,1.0,"[1, 2]"']


def test_sql_cannot_write_and_names_its_mistakes(profile):
    add_pair(profile)
    for query, expected in [
        ("DELETE FROM pairs", "read-only"), ("SELECT x FROM pairs", '"x" not found'),
        ("FROM ducklake_cleanup_old_files('lake', cleanup_all => true)", "does not take cleanup_old_files"),
        ("", "takes one SQL statement, got 0"), ("SELECT 1; SELECT 2", "takes one SQL statement, got 2"),
    ]:  # fmt: skip
        result = nbg("sql", query)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ") and expected in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "before", ["", "EXPLAIN ANALYZE ", "explain (analyze) ", "SELECT 1; ", "EXPLAIN /* */ ANALYZE "]
)
def test_sql_writes_no_file(profile, tmp_path, capsys, before):
    file = tmp_path / "out.csv"
    with pytest.raises((ValueError, LookupError)):
        sql.sql(f"{before}COPY (SELECT 1) TO '{file}'", "table", None, 40)
    assert not file.exists()


@pytest.mark.parametrize(
    "query", ["EXPLAIN SELECT 1", "EXPLAIN ANALYZE FROM pairs", "DESCRIBE pairs", "SHOW TABLES", "SUMMARIZE pairs",
              "FROM (PIVOT pairs ON slice IN ('a') USING count(*))", "FROM ducklake_snapshots('lake')"],
)  # fmt: skip
def test_sql_takes_every_kind_of_question(profile, query, capsys):
    sql.sql(query, "json", None, 40)
    json.loads(capsys.readouterr().out)


def test_compact_says_what_became_fewer(profile, capsys):
    for i in range(2):
        row = {"slice": "a", "scorer": "verifier", "scorer_id": "v", "score": 1.0}
        rows = pl.DataFrame([row | {"sample_id": f"{i}-{j}"} for j in range(20)])
        Lake.of(profile).commit(Record("filtered_pairs", "a", "r", "t"), [Write("scores", rows)])
    maintenance.compact_files()
    assert capsys.readouterr().out.startswith("scores: 2 files are now 1\n")


def test_programs_get_valid_json_and_whole_structs(profile):
    query = (
        "SELECT '-inf'::DOUBLE AS a, ['nan'::DOUBLE, 1] AS l, {'role': 'user', 'n': [{'k': 2}]} AS s, NULL::INT[] AS e"
    )
    rows = json.loads(nbg("sql", query, "--format", "json").stdout, parse_constant=pytest.fail)
    assert rows == [{"a": None, "l": [None, 1.0], "s": {"role": "user", "n": [{"k": 2}]}, "e": None}]
    header, row = csv.reader(nbg("sql", query, "--format", "csv").stdout.splitlines())
    assert header == ["a", "l", "s", "e"]
    assert (json.loads(row[1]), json.loads(row[2]), row[3]) == ([None, 1.0], {"role": "user", "n": [{"k": 2}]}, "")


def test_brackets_and_colons_are_shown_as_they_are(profile):
    texts = ["[addition]", "[/path]", "[bold]", ":smile:", "[1, 2]"]
    table = nbg("sql", f'SELECT unnest({texts}) AS "[red]"')
    assert table.returncode == 0
    assert all(text in table.stdout for text in [*texts, "[red]"]), table.stdout
    broken = nbg("sql", "SELECT '[/path]' FROM \"[addition]\"")
    assert broken.returncode == 1 and "[/path]" in broken.stderr and "Traceback" not in broken.stderr


def test_no_password_is_shown(profile, tmp_path, monkeypatch):
    data = json.loads(profile.model_dump_json())
    data["lake"]["catalog"] = "postgres:host=127.0.0.1 port=1 dbname=x password=s3cretpw"
    path = tmp_path / "postgres.yaml"
    path.write_text(yaml.safe_dump(data))
    monkeypatch.setenv("NBG_PROFILE", str(path))
    shown, failed = nbg("profile"), nbg("status")
    assert shown.returncode == 0 and "dbname=x password=***" in shown.stdout
    assert failed.returncode == 1 and "check lake.catalog" in failed.stderr
    assert "s3cretpw" not in shown.stdout + shown.stderr + failed.stdout + failed.stderr


def test_a_run_that_needs_vllm_where_there_is_none_is_refused_before_any_work(profile, tmp_path, monkeypatch):
    data = json.loads(profile.model_dump_json())
    data["sampling"]["backend"] = "vllm"
    path = tmp_path / "vllm.yaml"
    path.write_text(yaml.safe_dump(data))
    monkeypatch.setenv("NBG_PROFILE", str(path))
    (profile.resolve(profile.paths.queries) / "a.jsonl").write_text('{"prompt": "x"}\n')
    result = nbg("run")
    assert result.returncode == 1
    wanted = "sampling.backend 'vllm' need an environment with vLLM, and vllm.python"
    assert wanted in result.stderr and "; run `make vllm`, or give the addresses" in result.stderr
    assert "run `make vllm`" in nbg("profile").stderr
    assert Lake.of(profile).sql("SELECT * FROM lineage.materialisations").is_empty()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become another user")
def test_a_project_that_may_only_be_read_says_so():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        path = write_profile(Path(folder, "project"))
        command = [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            sys.executable,
            "-m",
            "nbg_assets.cli",
        ]
        env = {**os.environ, "NBG_PROFILE": str(path), "HOME": folder}
        result = subprocess.run([*command, "run"], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and "writable for this user" in result.stderr


def test_a_relative_profile_means_the_same_to_dev(profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBG_PROFILE", "cli.yaml")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    seen = {}
    monkeypatch.setattr(os, "execvp", lambda *_: seen.update(profile=os.environ["NBG_PROFILE"], cwd=os.getcwd()))
    CliRunner().invoke(app, ["dev"], catch_exceptions=False)
    assert seen == {"profile": str(tmp_path / "cli.yaml"), "cwd": str(PROJECT_ROOT)}


@pytest.mark.slow
def test_an_interrupt_ends_the_run_and_starts_nothing_more(profile, tmp_path):
    for name in ("a", "b"):
        row = {"prompt": f"say {name}", "answer": name, "verifier": "exact", "split": "train"}
        (profile.resolve(profile.paths.queries) / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "nbg_assets.cli", "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "DAGSTER_HOME": str(tmp_path / "home")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs have it ignored
    )  # fmt: skip
    while not (line := process.stdout.readline()).startswith("run queries"):
        assert line, process.stderr.read()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, out + err
    assert "stopped; what was committed is kept" in err and "Traceback" not in err
    assert "run " not in out and "failed" not in out


def test_an_interrupt_that_a_library_swallows_ends_the_run_at_the_next_line():
    said = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    with driver.interrupts() as interrupted, driver.worker_lines_to(said.append, interrupted):
        assets.worker_log.info("one")
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            assets.worker_log.info("two")
    signal.signal(signal.SIGINT, before)
    assert said == ["one"]


def test_an_interrupt_that_a_library_caught_and_logged_is_not_printed(capsys):
    record = logging.LogRecord("some.pool", logging.ERROR, "", 0, "Exception closing connection", (), None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with driver.interrupts():
        logging.lastResort.handle(record)
        assert capsys.readouterr().err == "Exception closing connection\n"
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        logging.lastResort.handle(record)
        assert capsys.readouterr().err == ""
    signal.signal(signal.SIGINT, before)
    logging.lastResort.handle(record)
    assert capsys.readouterr().err


def test_a_second_run_is_told_of_the_first_at_once(profile):
    with hold(profile.resolve(profile.paths.work) / "locks" / "nbg run.lock", "process 7 on here", ""):
        result = nbg("run")
    assert (result.returncode, result.stderr) == (
        1, "error: another `nbg run` is in progress: process 7 on here; wait for it or terminate it, then run again\n"
    )  # fmt: skip


def test_a_lock_that_the_work_itself_waits_for_is_not_taken_for_another_run(tmp_path):
    inner = FileLock(tmp_path / "inner.lock")
    with inner, pytest.raises(Timeout), hold(tmp_path / "outer.lock", "process 7", "taken:"):
        FileLock(tmp_path / "inner.lock", timeout=0, is_singleton=False).acquire()


@pytest.mark.slow
def test_bad_data_is_said_once_and_its_traceback_is_in_the_log_alone(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    (profile.resolve(profile.paths.queries) / "a.jsonl").write_text('{"prompt": 3}\n')
    result = nbg("run")
    assert result.returncode == 1
    (said,) = [line for line in (result.stdout + result.stderr).splitlines() if "a.jsonl" in line]
    assert said.startswith("failed: queries[a]: ") and "Traceback" not in result.stdout + result.stderr
    (log,) = profile.resolve(profile.paths.work).rglob("queries*.log")
    assert "Traceback" in log.read_text() and "QueryFileError" in log.read_text()


def test_a_failure_names_its_partition_once(profile, tmp_path, monkeypatch):
    message = "filtered_pairs[a]: no pair"
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    failed = [driver.Result("filtered_pairs", "a", ran=True, success=False, message=message)]
    monkeypatch.setattr(driver, "materialise_stale", lambda *_, **__: failed)
    assert f"failed: {message}\n" in CliRunner().invoke(app, ["run"]).stdout


def test_sql_shows_intervals(profile):
    add_pair(profile)
    query = 'SELECT max(created_at) - min(created_at) AS "how long", 1 AS one FROM lineage.materialisations;'
    (row,) = json.loads(nbg("sql", query, "--format", "json").stdout)
    assert row["one"] == 1 and ":" in row["how long"]


def test_sql_at_a_snapshot(profile):
    before = Lake.of(profile).snapshot()
    add_pair(profile)
    result = nbg("sql", "SELECT count(*) AS n FROM pairs", "--format", "json", "--snapshot", str(before))
    assert json.loads(result.stdout) == [{"n": 0}]
    span = "SELECT count(*) AS n, INTERVAL 1 DAY AS span FROM pairs"  # polars has no type for INTERVAL
    result = nbg("sql", span, "--format", "json", "--snapshot", str(before))
    assert json.loads(result.stdout) == [{"n": 0, "span": "1 day"}]
    gone = nbg("sql", "SELECT 1", "--snapshot", "9999")
    assert gone.stderr == f"error: the lake has no snapshot 9999; the newest is {before + 1}\n"


def test_dev_says_that_its_port_is_taken(profile):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        result = nbg("dev", "--port", port)
    assert result.returncode == 1 and f"port {port} on 127.0.0.1 is not free" in result.stderr
    assert "error: port 99999 on" in nbg("dev", "--port", "99999").stderr


def test_an_unknown_profile_key_is_one_line(profile, tmp_path, monkeypatch):
    bad = tmp_path / "bad.yaml"
    bad.write_text("models: {student: a, teacher: b}\nsamplign: {}\n")
    monkeypatch.setenv("NBG_PROFILE", str(bad))
    result = nbg("status")
    assert result.returncode == 1
    assert "unknown key 'samplign'; did you mean 'sampling'" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_status_of_a_new_project(profile):
    (profile.resolve(profile.paths.queries) / "a.jsonl").write_text('{"prompt": "x"}\n')
    result = nbg("status")
    assert result.returncode == 0
    assert result.stdout.count("never materialised") == len(ASSETS)


def test_a_missing_model_folder_is_named(profile, tmp_path, monkeypatch):
    data = json.loads(profile.model_dump_json())
    data["models"]["student"] = str(tmp_path / "nowhere")
    path = tmp_path / "gone.yaml"
    path.write_text(yaml.safe_dump(data))
    monkeypatch.setenv("NBG_PROFILE", str(path))
    result = nbg("status")
    assert result.returncode == 1
    assert f"no model at {tmp_path / 'nowhere'}" in result.stderr
    assert f"models.student: no model at {tmp_path / 'nowhere'}" in nbg("profile").stderr


def test_trace_and_report_say_when_there_is_nothing(profile):
    assert "starts with 'abc'" in nbg("trace", "abc").stderr
    assert "nothing is evaluated yet" in nbg("report").stderr


def test_tables_explain_every_table(profile):
    out = nbg("tables").stdout
    for name in ("queries", "samples", "scores", "pairs", "rejections", "teacher_logits", "lineage.materialisations"):
        assert f"{name}: 0 rows" in out
