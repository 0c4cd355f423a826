"""A new scorer is one row of SCORERS: profile, stage, rows, report, settings and plot follow, through Dagster."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import dagster as dg
import polars as pl
import pytest
from fake_worker import Fake, write_profile

from nbg_assets import assets, driver, plots
from nbg_assets.definitions import build
from nbg_core.config.load import load_profile
from nbg_core.lake.lake import Lake
from nbg_core.runtime import worker
from nbg_core.scorers.scorers import SCORERS, Scorer, by_response


@pytest.fixture
def profile(tmp_path, monkeypatch):
    scorer = Scorer("last_digit", "points", "the last character as a number",
                    by_response(lambda row: float(row["text"][-1])))  # fmt: skip
    monkeypatch.setitem(SCORERS, scorer.name, scorer)
    path = write_profile(tmp_path / "p", ("a",), preference={"weights": {"last_digit": 2.0}})
    monkeypatch.setenv("NBG_PROFILE", str(path))
    fake = Fake({"student_samples": lambda df: df.with_columns(text="sample_id")})  # its texts differ then
    for asset in ("queries", "student_samples"):
        fake(asset, "a", "run", profile=str(path), on_line=lambda _: None)

    def in_this_process(asset, slice_name, run_id, *, profile, on_line):
        return worker.materialise(asset, slice_name, run_id, load_profile(profile))

    monkeypatch.setattr(assets, "run_worker", in_this_process)
    return load_profile()


def make_pairs() -> dg.ExecuteInProcessResult:
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("slice", ["a"])
        return build().resolve_job_def("refresh_slice").execute_in_process(
            instance=instance, partition_key="a", raise_on_error=False, run_config=driver.QUIET,
            asset_selection=[dg.AssetKey("filtered_pairs")],
        )  # fmt: skip


def test_it_scores_makes_pairs_and_is_shown(profile):
    result = make_pairs()
    assert result.success, [driver.failure_message(e) for e in result.all_events if e.is_step_failure]
    lake = Lake.of(profile)
    scores = lake.sql("SELECT scorer, score, count(*) AS n FROM scores GROUP BY ALL ORDER BY score")
    assert scores.rows() == [("last_digit", 0.0, 3), ("last_digit", 1.0, 3)]
    assert lake.sql("SELECT DISTINCT margin FROM pairs").item() == 2.0
    (made,) = result.asset_materializations_for_node("filtered_pairs")
    assert made.metadata["mean scores"].value == {"last_digit": 0.5}
    assert made.metadata["scores"].value.startswith("![scores of all responses](data:image/png;base64,")
    assert all(check.passed for check in result.get_asset_check_evaluations())


def test_a_plot_that_cannot_be_drawn_is_said_and_fails_nothing(profile, monkeypatch):
    def broken(made):
        raise KeyError("last_digit")

    monkeypatch.setitem(plots.PLOTS, "scores", broken)
    result = make_pairs()
    assert result.success
    (made,) = result.asset_materializations_for_node("filtered_pairs")
    assert made.metadata["scores"].value == "could not be drawn: KeyError: 'last_digit'"
    assert made.metadata["margins"].value.startswith("![margins]")
    assert isinstance(Lake.of(profile).sql("FROM pairs"), pl.DataFrame)


def test_responses_with_one_text_may_have_other_scores_and_a_version_changes_the_id():
    samples = pl.DataFrame(
        {"sample_id": ["s1", "s2"], "query_id": ["q", "q"], "text": ["a", "a"], "length": [1.0, 2.0]}
    )
    scorer = Scorer("length", "tokens", "its length", by_response(lambda row: row["length"]))
    context = SimpleNamespace(progress=lambda total: SimpleNamespace(advance=lambda n: None), identity=lambda name: 7)
    assert pl.concat(scorer.compute(context, samples))["score"].to_list() == [1.0, 2.0]
    others = (dataclasses.replace(scorer, **change) for change in ({"version": "2"}, {"depends_on": ("x",)}))
    assert len({one.ids(context, samples)["scorer_id"].unique().item() for one in (scorer, *others)}) == 3
