"""Drift between sampler and reference, on responses that a real sampler drew at another temperature (10 s)."""

from __future__ import annotations

import math

import polars as pl
import pytest
from test_sampling import add_queries

from nbg_core.base import ids
from nbg_core.checks.checks import CHECKS, Subject
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Write
from nbg_core.lineage.run import Run
from nbg_core.reference import drift
from nbg_core.reference import stage as reference_stage
from nbg_core.sampling import stage as sampling_stage

CHECK = CHECKS["sampler_agrees"]


@pytest.fixture
def run(make_profile) -> Run:
    """Three queries, each with a pair: the student's response over the teacher's."""
    sampling = {"n_student": 1, "n_teacher": 1, "max_tokens": 12, "temperature": 0.4, "top_p": 0.8}
    profile = make_profile(sampling=sampling)
    run = Run(profile, Lake.of(profile), log=lambda line: None)
    add_queries(run, ["one", "two", "three"])
    sampling_stage.materialise(run, "a")
    drawn = run.lake.sql("SELECT query_id, source, sample_id FROM samples").pivot("source", index="query_id")
    pairs = [
        {"slice": "a", "pair_id": ids.pair_id(s, t), "query_id": q, "chosen_id": s, "rejected_id": t,
         "chosen_score": 1.0, "rejected_score": 0.0, "margin": 1.0}
        for q, s, t in drawn.select("query_id", "student", "teacher").iter_rows()
    ]  # fmt: skip
    run.commit("filtered_pairs", "a", [Write("pairs", pl.DataFrame(pairs))], data_version="v")
    return run


def test_one_kernel_and_any_temperature_give_no_drift_and_the_teachers_responses_are_left_out(run):
    report = reference_stage.materialise(run, "a")
    (students,) = run.lake.sql("SELECT sum(len(token_ids)) FROM samples WHERE source = 'student'").row(0)
    assert report.compared_tokens == students < run.lake.sql("SELECT sum(len(token_ids)) FROM samples").item()
    assert 0 <= report.sampler_drift_mean <= report.sampler_drift_max < 1e-4
    assert report.sampler_drift_share == 0
    assert CHECK.violations(Subject(run.lake, run.profile, "reference_logprobs", "a")).is_empty()


def test_a_sampler_that_drifts_is_measured_and_warned_of(run):
    reference_stage.materialise(run, "a")
    with run.lake.connect(read_only=False) as con:
        con.execute("UPDATE samples SET logprobs = list_transform(logprobs, (x, i) -> x - if(i = 2, 0.5, 0.01))")
    lengths = run.lake.sql("SELECT len(token_ids) AS n FROM samples WHERE source = 'student'")["n"].to_list()
    tokens, far = sum(lengths), sum(n >= 2 for n in lengths)
    found = drift.summary(run.lake, "a")
    assert found["compared_tokens"] == tokens
    assert found["sampler_drift_max"] == pytest.approx(0.5, abs=1e-4)
    assert found["sampler_drift_mean"] == pytest.approx((0.5 * far + 0.01 * (tokens - far)) / tokens, abs=1e-4)
    assert found["sampler_drift_share"] == pytest.approx(far / tokens)
    bars = dict(drift.histogram(run.lake, "a").iter_rows())
    assert sum(bars.values()) == tokens and bars[math.floor(4 * math.log10(0.5)) / 4] == far
    rows = CHECK.violations(Subject(run.lake, run.profile, "reference_logprobs", "a"))
    assert (rows.height, rows["past_bound"].to_list()) == (far, [1] * far) and not CHECK.blocking


def test_without_a_response_of_the_reference_there_is_nothing_to_say(run):
    with run.lake.connect(read_only=False) as con:
        con.execute("UPDATE samples SET model_id = 'earlier policy'")
    report = reference_stage.materialise(run, "a")
    assert (report.compared_tokens, report.sampler_drift_mean, report.sampler_drift_max) == (0, None, None)
    assert drift.histogram(run.lake, "a").is_empty()
    assert CHECK.violations(Subject(run.lake, run.profile, "reference_logprobs", "a")).is_empty()
