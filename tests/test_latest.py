"""'Newest' is by the lake's snapshots: a clock that goes back decides nothing."""

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from fake_worker import Fake, write_profile
from typer.testing import CliRunner

from nbg_assets.cli.main import app
from nbg_core.base.ids import model_id
from nbg_core.config.load import load_profile
from nbg_core.evaluation import promotion
from nbg_core.lake import lake as lake_module
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import checkpoint_row, current_samples, made_with
from nbg_core.lake.records import Record, Write
from nbg_core.lineage.policy import current_policy
from nbg_core.lineage.trace import trace

SLICED = ("queries", "student_samples", "filtered_pairs", "teacher_logits", "reference_logprobs")


class ClockGoingBack(datetime):
    """Each `now` is a day before the one before it."""

    calls = 0

    @classmethod
    def now(cls, tz=None):
        cls.calls += 1
        return datetime(2026, 1, 1, tzinfo=UTC) - timedelta(days=cls.calls)


@pytest.fixture
def profile(tmp_path, monkeypatch):
    path = write_profile(tmp_path / "p", ("a",))
    monkeypatch.setenv("NBG_PROFILE", str(path))
    for module in (lake_module, promotion):
        monkeypatch.setattr(module, "datetime", ClockGoingBack)
    monkeypatch.setattr(ClockGoingBack, "calls", 0)
    return load_profile()


def make(profile, *assets: str) -> Lake:
    fake = Fake()
    for asset in assets:
        fake(asset, "a" if asset in SLICED else None, "run", profile=str(profile.root / "test.yaml"), on_line=print)
    return fake.lake


def test_a_roll_back_with_an_earlier_time_is_the_newest_promotion(profile):
    lake = make(profile, *SLICED, "student_checkpoint")
    checkpoint = lake.sql("SELECT checkpoint_id FROM checkpoints").item()
    promotion.promote(lake, profile, checkpoint, "test")
    assert current_policy(lake, profile).model_id == checkpoint
    done = CliRunner().invoke(app, ["promote", "sft"])
    assert done.exit_code == 0, done.output
    student = model_id(profile.resolve(profile.models.student))
    assert f"policy is now {student}" in done.output
    times = lake.sql("SELECT promoted_at FROM promotions ORDER BY snapshot_id")["promoted_at"]
    assert times[1] < times[0], "or the clock did not go back"
    assert current_policy(lake, profile).model_id == student


def test_current_samples_are_those_of_the_newest_sampling(profile):
    lake = make(profile, "queries", "student_samples")
    first = current_samples(lake, "a", lake.snapshot())
    other = profile.model_copy(update={"sampling": profile.sampling.model_copy(update={"seed": 7})})
    (profile.root / "test.yaml").write_text(
        (profile.root / "test.yaml").read_text().replace("n_student: 2", "n_student: 2\n  seed: 7")
    )
    assert load_profile().sampling == other.sampling
    old = lake.sql("SELECT * EXCLUDE materialisation_id FROM samples")
    lake.commit(Record("student_samples", "a", "r", "t", "chunk"), [
        Write("samples", old.with_columns(sample_id=pl.format("old-{}", "sample_id"), slice=pl.lit("gone")))
    ])  # fmt: skip
    make(load_profile(), "student_samples")
    times = lake.sql(
        "SELECT created_at FROM lineage.commits WHERE asset = 'student_samples' AND status = 'complete' "
        "ORDER BY snapshot_id"
    )["created_at"]
    assert len(times) == 2 and times[1] < times[0]
    newest = lake.sql("SELECT DISTINCT sampling_id FROM samples WHERE slice = 'a'").item()
    assert made_with(lake, "student_samples", "a")["sampling_id"] == newest
    now = current_samples(lake, "a", lake.snapshot())
    assert now.height == first.height == 6
    assert not now["sample_id"].str.starts_with("old-").any()


def test_the_newest_row_of_a_checkpoint_is_that_of_the_last_commit(profile):
    lake = Lake.of(profile)
    for training, minute in (("first", 2), ("second", 1)):
        row = {"checkpoint_id": "c0ffee", "training_id": training, "path": training, "parent_model_id": "p",
               "teacher_model_id": "t", "input_snapshot": lake.snapshot(), "n_pairs": 1, "n_steps": 1, "settings": "{}",
               "created_at": datetime(2026, 1, 1, 0, minute, tzinfo=UTC)}  # fmt: skip
        replace = "checkpoint_id = 'nothing'"  # the primary key would leave the second row out
        lake.commit(Record("student_checkpoint", None, "r", "t"), [Write("checkpoints", pl.DataFrame([row]), replace)])
    assert checkpoint_row(lake, "c0f")["training_id"] == "second"
    assert trace(lake, "c0ffee")["checkpoints"]["training_id"].to_list() == ["first", "second"]
