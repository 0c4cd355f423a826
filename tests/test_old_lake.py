"""A lake that version 0.1.0 made opens, is fresh, answers its users' queries and goes on.

`data/lake_0.1.0.tar.gz` is the whole pipeline on two slices of 28 and 20 queries, made by that version on the embedded
models; `about.json` in it says what was there.
"""

import importlib.metadata
import json
import tarfile
from pathlib import Path

import pytest

from nbg_core.config.profile import PROJECT_ROOT, Profile
from nbg_core.evaluation.accuracy import latest_summary
from nbg_core.lake.lake import Lake
from nbg_core.lineage.run import Run
from nbg_core.lineage.staleness import status
from nbg_core.lineage.trace import trace
from nbg_core.queries import stage as queries_stage


@pytest.fixture
def about(tmp_path) -> dict:
    with tarfile.open(PROJECT_ROOT / "tests" / "data" / "lake_0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return json.loads((tmp_path / "about.json").read_text())


@pytest.fixture
def profile(tmp_path, about, monkeypatch) -> Profile:
    real = importlib.metadata.version  # versions of what computes are part of the ids
    monkeypatch.setattr("importlib.metadata.version", lambda package: about["versions"].get(package) or real(package))
    models = PROJECT_ROOT / "data" / "models"
    return Profile.model_validate({
        "name": "old", "root": tmp_path, "models": {"student": models / "student_sft", "teacher": models / "teacher"},
        "lake": {"catalog": "sqlite:lake/catalog.sqlite", "data_path": "lake/files"},
        "paths": {"queries": "data/queries", "work": "work", "checkpoints": "checkpoints"},
        "sampling": {"n_student": 4, "max_tokens": 24}, "evaluation": {"max_tokens": 24},
        "teacher": {"k_head": 8, "m_tail": 4}, "threads": 1,
        "training": {"global_batch_pairs": 8, "max_steps": 3, "learning_rate": 0.0005},
    })  # fmt: skip


def test_everything_is_fresh(profile, monkeypatch):
    monkeypatch.setattr("nbg_core.config.identity.STORE_VERSION", 4)  # that of its teacher rows
    states = {(s.asset, s.slice_name): s.state for s in status(Lake.of(profile), profile)}
    sliced = ("queries", "student_samples", "filtered_pairs", "teacher_logits", "reference_logprobs")
    made = {(asset, name) for asset in sliced for name in ("addition", "sorting")}
    made |= {("student_checkpoint", None), ("student_eval", None)}
    assert {key: state for key, state in states.items() if key in made} == dict.fromkeys(made, "fresh")


def test_every_table_and_column_answers_as_before(profile, about):
    lake = Lake.of(profile)
    for table, columns in about["columns"].items():
        assert lake.sql(f"SELECT {', '.join(columns)} FROM {table}").height == about["rows"][table], table


def test_its_report_and_its_lineage_are_read(profile, about):
    lake = Lake.of(profile)
    checkpoint, summary, made_by = latest_summary(lake)
    assert (checkpoint, made_by) == (about["checkpoint"], "old")
    found = {r["slice"]: [r["n"], r["before"], r["after"], r["teacher"]] for r in summary.to_dicts()}
    assert found == {name: pytest.approx(values) for name, values in about["accuracy"].items()}
    used = lake.sql("SELECT count(DISTINCT pair_id) FROM checkpoint_pairs").item()
    assert trace(lake, checkpoint)["pairs"].height == used > 0


def test_it_goes_on_with_a_new_query(profile, tmp_path):
    file = Path(tmp_path, "data", "queries", "addition.jsonl")
    file.write_text(file.read_text() + json.dumps({"prompt": "Add: 1 + 1", "answer": "2", "verifier": "exact"}) + "\n")
    lake = Lake.of(profile)
    stale = {(s.asset, s.slice_name) for s in status(lake, profile) if s.state != "fresh"}
    assert ("queries", "addition") in stale and ("queries", "sorting") not in stale
    report = queries_stage.materialise(Run(profile, lake, log=lambda line: None), "addition")
    assert (report.rows, report.new_rows) == (lake.sql("FROM queries WHERE slice = 'addition'").height, 1)
    states = {(s.asset, s.slice_name): s.state for s in status(lake, profile)}
    assert states["queries", "addition"] == "fresh"
