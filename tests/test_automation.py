"""Schedule and sensors, evaluated without a daemon on a lake that a fake worker fills (10 s)."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime

import dagster as dg
import pytest
from dagster import DagsterRunStatus
from fake_worker import Fake, write_profile

from nbg_assets import driver, partitions, schedules, sensors
from nbg_assets.definitions import build
from nbg_core.assets import PARTITIONED
from nbg_core.config.load import load_profile

SLICED = list(PARTITIONED)


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setenv("NBG_PROFILE", str(write_profile(tmp_path / "project")))
    return load_profile()


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def fill(fake: Fake, assets=(*SLICED, "student_checkpoint", "student_eval")) -> None:
    """Make every slice's partitions, and what comes after, without Dagster."""
    for asset in assets:
        for slice_name in ("a", "b") if asset in SLICED else (None,):
            fake(asset, slice_name, "run", profile=os.environ["NBG_PROFILE"], on_line=lambda _: None)


def schedule_tick(instance):
    defs = build()
    when = datetime(2026, 1, 2, 3, tzinfo=UTC)
    with dg.build_schedule_context(instance, scheduled_execution_time=when, resources=defs.resources) as context:
        return defs.resolve_schedule_def("refresh_all_slices")(context)


def sensor_tick(instance, name: str):
    defs = build()
    with dg.build_sensor_context(instance, resources=defs.resources) as context:
        return defs.resolve_sensor_def(name)(context)


def requests(tick) -> list[dg.RunRequest]:
    match tick:
        case dg.SkipReason():
            return []
        case dg.RunRequest():
            return [tick]
        case dg.SensorResult():
            return list(tick.run_requests)
    return tick


def asked(tick) -> dict[str | None, list[str]]:
    return {r.partition_key: [k.path[-1] for k in r.asset_selection or ()] for r in requests(tick)}


def age(profile, seconds: float) -> None:
    for path in (profile.root / "queries").iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def test_the_schedule_asks_for_what_is_stale_and_nothing_else(profile):
    with dg.instance_for_test() as instance:  # a schedule's context only takes an instance that is on disk
        check_schedule(instance, profile)


def check_schedule(instance, profile):
    assert asked(schedule_tick(instance)) == {}  # no partitions yet: nothing that a run could be of
    assert partitions.sync_partitions(instance, profile) == ["a", "b"]
    tick = schedule_tick(instance)
    assert asked(tick) == {"a": SLICED, "b": SLICED}
    assert [r.run_key for r in requests(tick)] == [f"2026-01-02T03:00:00+00:00:{s}" for s in "ab"]
    fill(Fake())
    assert schedule_tick(instance).skip_message == "no slice is stale"
    (profile.root / "queries" / "b.jsonl").write_text("{}\n{}\n")
    assert asked(schedule_tick(instance)) == {"b": SLICED}
    run = instance.create_run_for_job(build().resolve_job_def("refresh_slice"), tags={"dagster/partition": "b"})
    for event, status in (
        (None, "NOT_STARTED"), (dg.DagsterEventType.PIPELINE_STARTING, "STARTING"),
        (dg.DagsterEventType.PIPELINE_START, "STARTED"), (dg.DagsterEventType.PIPELINE_CANCELING, "CANCELING"),
    ):  # fmt: skip
        if event:
            instance.report_dagster_event(dg.DagsterEvent(event.value, run.job_name), run.run_id)
        assert instance.get_run_by_id(run.run_id).status.value == status
        assert schedule_tick(instance).skip_message == "no stale slice can start; already running: b"
    instance.report_run_canceled(run)
    assert asked(schedule_tick(instance)) == {"b": SLICED}


def test_a_run_is_unfinished_until_it_has_succeeded_failed_or_been_canceled():
    ended = {DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED, DagsterRunStatus.MANAGED}
    assert set(schedules.UNFINISHED) == set(DagsterRunStatus) - ended  # MANAGED: Dagster does not run it
    never_in_process = {DagsterRunStatus.QUEUED, DagsterRunStatus.SUSPENDED}
    assert set(driver.LEFT_BY_A_KILL) == set(schedules.UNFINISHED) - never_in_process


def test_training_is_asked_for_once_all_slices_are_fresh(instance, profile, monkeypatch):
    with dg.instance_for_test() as on_disk:  # only such an instance keeps which schedules are on
        tick = sensor_tick(on_disk, "train_when_slices_fresh")
    assert tick.skip_message == "the schedule refresh_all_slices is off"
    monkeypatch.setattr(sensors, "is_on", lambda _: True)  # the live test switches it on for real
    tick = sensor_tick(instance, "train_when_slices_fresh")
    assert tick.skip_message == "slices are not fresh: a, b"
    fake = Fake()
    fill(fake, SLICED)
    tick = sensor_tick(instance, "train_when_slices_fresh")
    assert asked(tick) == {None: ["student_checkpoint", "student_eval"]}
    key = requests(tick)[0].run_key
    assert requests(sensor_tick(instance, "train_when_slices_fresh"))[0].run_key == key, "a failed run is not retried"
    run = instance.create_run_for_job(build().resolve_job_def("train"))
    assert sensor_tick(instance, "train_when_slices_fresh").skip_message == "training is running"
    instance.report_run_failed(run)
    fill(fake, ["student_checkpoint"])
    evaluation = requests(sensor_tick(instance, "train_when_slices_fresh"))[0]
    assert [k.path[-1] for k in evaluation.asset_selection] == ["student_eval"]
    assert evaluation.run_key != key, "an evaluation that failed is asked for again"
    fill(fake, ["student_eval"])
    assert (
        sensor_tick(instance, "train_when_slices_fresh").skip_message == "the checkpoint and its evaluation are fresh"
    )
    path = profile.root / "test.yaml"
    path.write_text(path.read_text() + "training: {epochs: 2}\n")
    again = requests(sensor_tick(instance, "train_when_slices_fresh"))[0]
    assert again.run_key != key, "other settings are another training"


def test_a_new_file_becomes_a_partition_with_a_run_and_a_bad_name_is_refused(instance, profile):
    queries = profile.root / "queries"
    (queries / "range...of.jsonl").write_text("{}\n")
    tick = sensor_tick(instance, "new_query_files")
    assert not requests(tick), "files this young may still be being copied"
    age(profile, 60)
    tick = sensor_tick(instance, "new_query_files")
    assert sorted(r.partition_key for r in requests(tick)) == ["a", "b"]
    (request,) = tick.dynamic_partitions_requests
    assert (request.partitions_def_name, sorted(request.partition_keys)) == ("slice", ["a", "b"])
    instance.add_dynamic_partitions("slice", ["a", "b"])
    tick = sensor_tick(instance, "new_query_files")
    assert not requests(tick) and "'range...of' cannot be a slice" in tick.skip_message
    (queries / "c.parquet").write_text("new")
    age(profile, 60)
    assert [r.partition_key for r in requests(sensor_tick(instance, "new_query_files"))] == ["c"]


def test_sync_leaves_bad_names_out_and_never_removes(instance, profile):
    (profile.root / "queries" / "range...of.jsonl").write_text("{}\n")
    instance.add_dynamic_partitions("slice", ["gone"])
    assert partitions.sync_partitions(instance, profile) == ["a", "b"]
    assert partitions.sync_partitions(instance, profile) == []
    assert sorted(instance.get_dynamic_partitions("slice")) == ["a", "b", "gone"]
