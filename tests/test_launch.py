"""Between the end of a training and its commit: what a kill there costs (the training itself is a stand-in; 10 s)."""

from __future__ import annotations

import json
import shutil
import sys
import time

import polars as pl
import pytest
from training_lake import make_profile

from nbg_core.base import ids
from nbg_core.base.files import link_folder
from nbg_core.lake import tables
from nbg_core.lake.lake import Lake
from nbg_core.lake.tables import TrainingSteps
from nbg_core.lineage.run import Run
from nbg_core.training import launcher, stage
from nbg_core.training.plan import Plan
from nbg_core.training.stage import materialise

METRICS = set(TrainingSteps.column_names()) - {"training_id", "step", "materialisation_id"}


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """Ids of the trainings that ran; each gives the policy's own weights back."""
    ran = []

    def train(run, request):
        ran.append(request.training_id)
        steps = Plan(run.lake.sql("SELECT count(*) FROM pairs").item(), request.training)
        request.work.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"step": s.index} | dict.fromkeys(METRICS, 1.0)) for s in steps]
        request.steps_file.write_text("\n".join(lines))
        shutil.copytree(request.policy_path, request.final)

    monkeypatch.setattr(stage, "launch", train)
    return ran


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True], ids=["before the commit", "after the commit"])
def test_a_training_that_ended_is_not_repeated(tmp_path, trainings, monkeypatch, after):
    profile = make_profile(tmp_path, n_pairs=6)
    run = Run(profile, Lake.of(profile), "first", log=lambda line: None)
    real = Lake.commit

    def killed(self, *args):
        if after:
            real(self, *args)
        raise Killed

    monkeypatch.setattr(Lake, "commit", killed)
    with pytest.raises(Killed):
        materialise(run)
    assert run.lake.sql("SELECT count(*) FROM checkpoints").item() == after
    monkeypatch.setattr(Lake, "commit", real)
    report = materialise(Run(profile, run.lake, "second", log=lambda line: None))
    assert trainings == [report.training_id]
    assert run.lake.sql("SELECT checkpoint_id FROM checkpoints").item() == report.checkpoint_id
    assert ids.model_id(report.path) == report.checkpoint_id
    assert not list((tmp_path / "work" / "training").glob("*"))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [report.checkpoint_id]


def test_which_pair_was_used_when_is_written_a_part_at_a_time_in_one_commit(tmp_path, trainings, monkeypatch):
    profile = make_profile(tmp_path, n_pairs=6, global_batch_pairs=2, epochs=3)
    run = Run(profile, Lake.of(profile), log=lambda line: None)
    monkeypatch.setattr(stage, "USES_AT_ONCE", 4)
    parts, validate = [], tables.validate
    monkeypatch.setattr(tables, "validate", lambda table, df: parts.append((table, df.height)) or validate(table, df))
    materialise(run)
    assert [n for table, n in parts if table == "checkpoint_pairs"] == [4, 4, 4, 4, 2]
    used = run.lake.sql("SELECT step, epoch, pair_id, slice FROM checkpoint_pairs ORDER BY ALL")
    pairs = run.lake.sql("SELECT pair_id, slice FROM pairs ORDER BY pair_id").rows()
    expected = [(step.index, step.epoch, *pairs[i]) for step in Plan(6, profile.training) for i in step.pairs]
    assert used.rows() == sorted(expected) and len(expected) == 18
    assert used.group_by("epoch").agg(pl.col("pair_id").n_unique())["pair_id"].to_list() == [6] * 3
    assert run.lake.sql("SELECT DISTINCT materialisation_id FROM checkpoint_pairs").height == 1


LAUNCHER = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
print("student_checkpoint: waiting", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("hosts", [None, "hosts"])
def test_a_launcher_with_a_hostfile_is_asked_to_end_before_it_is_killed(tmp_path, monkeypatch, hosts):
    """It alone can end the ranks on other machines; ranks on this one end with their stdin."""
    profile = make_profile(tmp_path, n_pairs=6, hostfile=hosts)
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "ended")]
    monkeypatch.setattr(launcher, "_command", lambda *_: command)

    def interrupted(line):
        if "waiting" in line:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        materialise(Run(profile, Lake.of(profile), log=interrupted))
    assert (tmp_path / "ended").exists() == (hosts is not None)
    assert time.monotonic() - began < 30


def test_a_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "there" / "target"
    (source / "below").mkdir(parents=True)
    (source / "a").write_text("a")
    (source / "below" / "b").write_text("b")

    def no_links(*args):
        raise OSError("no links here")

    with monkeypatch.context() as m:
        m.setattr("os.link", no_links)
        m.setattr("shutil.copy2", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            link_folder(source, target)
        assert not target.exists()
    for links in (True, False):
        with monkeypatch.context() as m:
            if not links:
                m.setattr("os.link", no_links)
            link_folder(source, target)
        assert {p.name: p.read_text() for p in target.rglob("*") if p.is_file()} == {"a": "a", "b": "b"}
        assert ((target / "a").stat().st_nlink == 2) == links
        shutil.rmtree(target)
