"""Assets through Dagster on a temporary instance: what a run shows, what its checks stop, what a failure says.

A fake worker stands in for the stages (15 s); test_command.py runs the real ones.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

import dagster as dg
import polars as pl
import pytest
from fake_worker import Fake, write_profile

from nbg_assets import assets, driver, metadata, plots
from nbg_assets.definitions import build
from nbg_assets.driver import Result, materialise_stale
from nbg_core.assets import PARTITIONED, UNPARTITIONED
from nbg_core.checks.checks import checks_of
from nbg_core.config.load import load_profile
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import latest_materialisation
from nbg_core.lake.records import Record, Write

SLICED = ["queries", "student_samples", "filtered_pairs", "teacher_logits", "reference_logprobs"]
EVERY = 2 * len(PARTITIONED) + len(UNPARTITIONED)
"""Partitions of a project with two slices."""


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def fake(monkeypatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(assets, "run_worker", fake)
    return fake


@pytest.fixture
def profile(tmp_path, monkeypatch):
    path = write_profile(tmp_path / "project")
    monkeypatch.setenv("NBG_PROFILE", str(path))
    return load_profile()


def run_slice(instance, slice_name: str, selection=None) -> dg.ExecuteInProcessResult:
    instance.add_dynamic_partitions("slice", [slice_name])
    return build().resolve_job_def("refresh_slice").execute_in_process(
        instance=instance, partition_key=slice_name, raise_on_error=False, run_config=driver.QUIET,
        asset_selection=[dg.AssetKey(a) for a in selection or SLICED],
    )  # fmt: skip


def step_failure(result) -> tuple[str, str]:
    """Asset and sentence of the only failed step."""
    (event,) = [e for e in result.all_events if e.is_step_failure]
    return event.step_key, driver.failure_message(event)


def test_a_materialisation_shows_counts_profile_snapshot_preview_and_plots(instance, profile, fake):
    result = run_slice(instance, "a")
    assert result.success
    for asset in SLICED:
        (made,) = result.asset_materializations_for_node(asset)
        shown, row = made.metadata, latest_materialisation(Lake.of(profile), asset, "a")
        assert shown["profile"].value == "test" and made.partition == "a"
        assert shown["snapshot"].value == row["snapshot_id"] and row["run_id"] == result.run_id
        assert made.tags["dagster/data_version"] == row["data_version"]
        assert shown["dagster/partition_row_count"].value == shown["new rows"].value > 0
        assert shown["counts"].value == {"kept": shown["dagster/partition_row_count"].value}
        assert len(shown["preview"].value.splitlines()) >= 5
    metadata = {a: result.asset_materializations_for_node(a)[0].metadata for a in SLICED}
    assert "| a \\| 0 |" in metadata["queries"]["preview"].value, "a cell may not break the table"
    for asset, plot in (("student_samples", "response lengths"), ("filtered_pairs", "margins"),
                        ("filtered_pairs", "scores"), ("teacher_logits", "stored distribution"),
                        ("reference_logprobs", "sampler drift")):  # fmt: skip
        image = metadata[asset][plot].value
        assert image.startswith(f"![{'scores of all responses' if plot == 'scores' else plot}](data:image/png;base64,")
        assert len(image) < 100_000
    passed = {(c.asset_key.path[-1], c.check_name): c.passed for c in result.get_asset_check_evaluations()}
    assert passed == {(a, c.name): True for a in SLICED for c in checks_of(a)}


def test_plots_leave_out_responses_of_earlier_settings_and_count_in_the_lake(instance, profile, fake, monkeypatch):
    run_slice(instance, "a")
    counted = []
    monkeypatch.setattr(
        metadata.Made, "sql", lambda made, *q: counted.append(made.lake.sql(q[0], q[1:])) or counted[-1]
    )
    old = Lake.of(profile).sql("SELECT * EXCLUDE (materialisation_id) FROM samples WHERE slice = 'a'")
    old = old.with_columns(pl.format("old-{}", "sample_id").alias("sample_id"), pl.lit("before").alias("sampling_id"))
    Lake.of(profile).commit(Record("student_samples", "a", "r", "t", status="chunk"), [Write("samples", old)])
    made = metadata.Made("student_samples", "a", profile, Lake.of(profile), {}, 0.0)
    for draw, names in ((plots.response_lengths, ["finished: stop"]), (plots.scores, ["verifier"] * 2),
                        (plots.margins, ["kept pairs"])):  # fmt: skip
        assert draw(made).png.startswith(b"\x89PNG")
        assert counted[-1]["name"].to_list() == names
    assert [df["n"].to_list() for df in counted] == [[6], [3, 3], [3]]
    scores = Lake.of(profile).sql("SELECT * EXCLUDE (materialisation_id) FROM scores WHERE slice = 'a'")
    scores = scores.with_columns(scorer_id=pl.lit("corrected"), score=pl.lit(0.25))
    Lake.of(profile).commit(Record("filtered_pairs", "a", "r", "t", status="chunk"), [Write("scores", scores)])
    plots.scores(made)
    assert counted[-1]["n"].to_list() == [6], "the newest score of a response counts"


def test_a_partition_that_lost_rows_and_got_none_has_changed(instance, profile, fake, monkeypatch):
    run_slice(instance, "a")
    monkeypatch.setattr(assets, "run_worker", lambda *args, **more: fake(*args, **more) | {"new_rows": 0})
    fake.spoil = {"filtered_pairs": lambda df: df.head(2)}
    for unchanged in (False, True):
        result = run_slice(instance, "a", ["filtered_pairs"])
        (made,) = result.asset_materializations_for_node("filtered_pairs")
        assert made.metadata["unchanged"].value == unchanged


def test_everything_stale_is_materialised_once_and_training_comes_last(instance, profile, fake):
    lines = []
    results = materialise_stale(instance, profile, on_line=lines.append)
    assert sorted((r.name, r.ran, r.success) for r in results) == sorted(
        (a + (f"[{s}]" if s else ""), True, True) for a, s in fake.calls
    )
    assert len(fake.calls) == EVERY
    assert fake.calls[-2:] == [("student_checkpoint", None), ("student_eval", None)]
    assert lines.count("queries: working") == 2
    assert sorted(instance.get_dynamic_partitions("slice")) == ["a", "b"]
    event = instance.get_latest_materialization_event(dg.AssetKey("student_checkpoint"))
    assert {"losses", "log-probabilities", "margin and accuracy", "gradient norm"} <= set(
        event.asset_materialization.metadata
    )
    event = instance.get_latest_materialization_event(dg.AssetKey("student_eval"))
    assert event.asset_materialization.metadata["accuracy"].value.startswith("![held-out accuracy](data:image/png")

    done = len(fake.calls)
    again = materialise_stale(instance, profile, on_line=lines.append)
    assert len(fake.calls) == done and len(again) == EVERY and not any(r.ran for r in again)

    (profile.root / "queries" / "b.jsonl").write_text("{}\n{}\n")
    again = materialise_stale(instance, profile, on_line=lines.append)
    assert len(again) == EVERY and not any(r.ran for r in again), "a stage that found its rows there has made nothing"
    assert fake.calls[done:] == [("queries", "b")] + fake.calls[done + 1 :]
    assert {s for _, s in fake.calls[done:]} == {"b"}, "the same content came out: training is still fresh"


def test_another_run_that_is_going_on_is_named(instance, profile, fake):
    other = instance.create_run_for_job(build().resolve_job_def("train"), status=dg.DagsterRunStatus.STARTED)
    lines = []
    materialise_stale(instance, profile, slices=["a"], on_line=lines.append)
    assert lines[0].startswith(f"run {other.run_id} of job train is in progress; steps that load a model wait")


def test_only_the_slices_asked_for_are_run_and_training_waits_for_the_others(instance, profile, fake):
    lines = []
    results = materialise_stale(instance, profile, slices=["a"], on_line=lines.append)
    assert {r.slice_name for r in results} == {s for _, s in fake.calls} == {"a"}
    why = "not started: training needs every slice, and these are not fresh: b"
    assert f"student_checkpoint, student_eval {why}" in lines
    assert all(r.success for r in results), "nothing but slice a was asked for"
    with pytest.raises(LookupError, match="no slice 'c'; slices: a, b"):
        materialise_stale(instance, profile, slices=["c"])


def test_a_file_that_cannot_be_a_slice_holds_nothing_up(instance, profile, fake):
    (profile.root / "queries" / "._a.jsonl").write_text("{}\n")
    (profile.root / "queries" / "folder.jsonl").mkdir()
    lines = []
    results = materialise_stale(instance, profile, on_line=lines.append)
    assert all(r.ran and r.success for r in results) and fake.calls[-1] == ("student_eval", None)
    assert any(line.startswith("left out: '._a' cannot be a slice") for line in lines)
    with pytest.raises(ValueError, match="'._a' cannot be a slice"):
        materialise_stale(instance, profile, slices=["._a"])


def test_training_that_is_due_and_cannot_start_is_a_failure(instance, profile, fake):
    fake.spoil["filtered_pairs"] = lambda df: df.with_columns(pl.lit(0.4).alias("margin"))
    results = materialise_stale(instance, profile, on_line=lambda _: None)
    why = "not started: training needs every slice, and these are not fresh: a, b"
    assert Result("student_checkpoint", None, False, False, why) in results
    assert {r.name: r.checks_failed for r in results if r.checks_failed} == dict.fromkeys(
        ("filtered_pairs[a]", "filtered_pairs[b]"), 1
    )


def test_a_profile_that_needs_vllm_where_there_is_none_is_refused_before_the_first_stage(
    instance, tmp_path, monkeypatch, fake
):
    path = write_profile(tmp_path / "vllm", sampling={"backend": "vllm"})
    monkeypatch.setenv("NBG_PROFILE", str(path))
    name, sentence = step_failure(run_slice(instance, "a", ["queries"]))
    assert (name, fake.calls) == ("queries", [])
    assert sentence.startswith("sampling.backend 'vllm' need") and "run `make vllm`" in sentence


def test_an_interrupt_in_a_step_ends_everything(instance, profile, monkeypatch):
    calls = []

    def interrupted(asset, slice_name, *_, **__):
        calls.append((asset, slice_name))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(assets, "run_worker", interrupted)
    with default_interrupt(), pytest.raises(KeyboardInterrupt):
        materialise_stale(instance, profile, on_line=lambda _: None)
    assert calls == [("queries", "a")]


@contextmanager
def default_interrupt():
    """SIGINT raises, also where pytest was started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_failed_worker_fails_the_step_with_its_own_sentence(instance, profile, fake):
    fake.fail["student_samples"] = "the model is too small for this prompt"
    result = run_slice(instance, "a")
    assert step_failure(result) == ("student_samples", "the model is too small for this prompt")
    (event,) = [e for e in result.all_events if e.is_step_failure]
    shown = event.step_failure_data.user_failure_data.metadata
    assert shown["log"].value == "worker.log" and shown["end of log"].value == "last line of the log"
    results = materialise_stale(instance, profile, slices=["a"], on_line=lambda _: None)
    assert Result("student_samples", "a", True, False, "the model is too small for this prompt") in results
    assert not any(r.ran and r.asset == "filtered_pairs" for r in results)


def test_a_broken_invariant_stops_the_run_and_a_later_run_that_would_read_it(instance, profile, fake):
    fake.spoil["filtered_pairs"] = lambda df: df.with_columns(margin=pl.lit(0.4))
    result = run_slice(instance, "a")
    assert not result.success
    (failed,) = [c for c in result.get_asset_check_evaluations() if not c.passed]
    assert (failed.check_name, failed.severity) == ("margins_wide_enough", dg.AssetCheckSeverity.ERROR)
    assert failed.metadata["violations"].value == 3 and "| a-0-pair |" in failed.metadata["first violations"].value
    ran = [a for a, _ in fake.calls]
    assert ran == ["queries", "student_samples", "filtered_pairs"]
    name, sentence = step_failure(run_slice(instance, "a", ["teacher_logits"]))
    assert name == "teacher_logits" and len(fake.calls) == len(ran)
    assert sentence.startswith("not started: filtered_pairs[a] fails its check margins_wide_enough (3 violations)")


def test_a_warning_does_not_stop_the_run(instance, profile, fake):
    fake.spoil["student_samples"] = lambda df: df.with_columns(finish_reason=pl.lit("length"))
    result = run_slice(instance, "a", ["queries", "student_samples"])
    assert result.success
    (failed,) = [c for c in result.get_asset_check_evaluations() if not c.passed]
    assert (failed.check_name, failed.severity) == ("few_truncated", dg.AssetCheckSeverity.WARN)
    results = materialise_stale(instance, profile, slices=["b"], on_line=lambda _: None)
    assert Result("student_samples", "b", ran=True, checks_failed=1) in results
    pairs = run_slice(instance, "a", ["filtered_pairs"])
    assert [c.check_name for c in pairs.get_asset_check_evaluations() if not c.passed] == ["no_truncated_positive"]


def test_a_run_whose_command_was_killed_is_ended_and_frees_the_pool(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    job = build().resolve_job_def("train")
    with driver.dagster_instance(profile) as instance:
        host = driver.socket.gethostname()
        killed, alive = (
            instance.create_run_for_job(job, tags={driver.PROCESS_TAG: f"{host}:{pid}"}) for pid in (2**22 + 1, 1)
        )
        storage = instance.event_log_storage
        storage.initialize_concurrency_limit_to_default("model")
        assert storage.claim_concurrency_slot("model", killed.run_id, "step").is_claimed
        assert not storage.claim_concurrency_slot("model", alive.run_id, "step").is_claimed
        driver._end_killed_runs(instance)
        assert instance.get_run_by_id(killed.run_id).status == dg.DagsterRunStatus.FAILURE
        assert instance.get_run_by_id(alive.run_id).status == dg.DagsterRunStatus.NOT_STARTED
        assert storage.claim_concurrency_slot("model", alive.run_id, "step").is_claimed
