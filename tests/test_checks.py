"""Checks: each one finds the rows that break it, says nothing of sound rows, and refuses whoever would read them (8 s).

One lake; every kind of damage has a slice of its own, made by the fake worker with one column changed.
"""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl
import pytest
from fake_worker import Fake, write_profile

from nbg_core.assets import get
from nbg_core.checks.checks import Subject, broken_upstream, checks_of
from nbg_core.config.load import load_profile
from nbg_core.lake.records import Record, Write
from nbg_core.reference import drift

SPOILED = {
    "overlap": ("queries", "no_train_eval_overlap", pl.lit([{"role": "user", "content": "one"}]).alias("messages")),
    "no_train": ("queries", "has_training_queries", pl.lit("eval").alias("split")),
    "no_eval": ("queries", "has_held_out_queries", pl.lit("train").alias("split")),
    "vocabulary": ("student_samples", "tokens_in_vocabulary", pl.lit([3, 64]).alias("token_ids")),
    "empty": ("student_samples", "tokens_in_vocabulary", pl.lit([], pl.List(pl.Int64)).alias("token_ids")),
    "few": ("student_samples", "every_query_answered", pl.lit("other model").alias("model_id")),
    "truncated": ("student_samples", "few_truncated", pl.lit("length").alias("finish_reason")),
    "blank": ("student_samples", "few_empty", pl.lit(" ").alias("text")),
    "margin": ("filtered_pairs", "margins_wide_enough", pl.lit(0.4).alias("margin")),
    "margin_lie": ("filtered_pairs", "margins_wide_enough", pl.lit(0.9).alias("margin")),
    "unknown": ("filtered_pairs", "responses_exist", pl.lit("nobody").alias("rejected_id")),
    "held_out": ("filtered_pairs", "no_held_out_query", pl.lit("held_out-3").alias("query_id")),
    "removed": ("filtered_pairs", "no_held_out_query", pl.lit("a query that is gone").alias("query_id")),
    "no_pairs": ("filtered_pairs", "has_pairs", pl.lit("elsewhere").alias("slice")),
    "lengths": ("teacher_logits", "lengths_match", pl.lit([0.0]).alias("token_logprobs")),
    "entries": ("teacher_logits", "lengths_match", pl.lit([1, 0]).alias("tail_counts")),
    "mass": ("teacher_logits", "mass_is_one", pl.lit([-1.0, -math.inf]).alias("tail_logmass")),
    "settings": ("teacher_logits", "one_row_per_response", pl.lit("other settings").alias("settings_id")),
    "positive": ("reference_logprobs", "lengths_match", pl.lit([-0.1, 0.2]).alias("token_logprobs")),
    "drift": ("reference_logprobs", "sampler_agrees", pl.lit([-0.1, -0.31]).alias("token_logprobs")),
    "reference": ("reference_logprobs", "one_row_per_response", pl.lit("other model").alias("model_id")),
}  # fmt: skip
SLICED = ("queries", "student_samples", "filtered_pairs", "teacher_logits", "reference_logprobs")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, Fake]:
    """Path of a profile whose slices are `sound` and one for each way to be spoilt."""
    path = str(write_profile(tmp_path_factory.mktemp("checks"), ("sound", *SPOILED)))
    fake = Fake()
    for slice_name in ("sound", *SPOILED):
        spoilt, _, column = SPOILED.get(slice_name, (None, None, None))
        for asset in SLICED:
            fake.spoil = {asset: lambda df, c=column: df.with_columns(c.cast(df.schema[c.meta.output_name()]))}
            fake.spoil = fake.spoil if asset == spoilt else {}
            fake(asset, slice_name, "run", profile=path, on_line=lambda _: None)
            if asset == spoilt:
                break
    return path, fake


def failing(path: str, fake: Fake, slice_name: str | None, assets=SLICED) -> list[tuple[str, str]]:
    profile = load_profile(path)
    return [
        (a, c.name) for a in assets for c in checks_of(a)
        if c.violations(Subject(fake.lake, profile, a, slice_name)).height
    ]  # fmt: skip


def test_a_sound_slice_fails_nothing(made):
    assert failing(*made, "sound") == []


@pytest.mark.parametrize("slice_name", SPOILED)
def test_damage_is_found_and_refuses_the_next_stage(made, slice_name):
    path, fake = made
    asset, check, _ = SPOILED[slice_name]
    upstream = SLICED[: SLICED.index(asset)]
    assert failing(path, fake, slice_name, upstream) == []
    assert (asset, check) in failing(path, fake, slice_name, [asset])
    (blocking,) = [c.blocking for c in checks_of(asset) if c.name == check]
    for reader in [a for a in SLICED if asset in get(a).upstream]:
        reason = broken_upstream(fake.lake, load_profile(path), reader, slice_name)
        assert (reason is not None) == blocking
        assert reason is None or reason.startswith(f"{asset}[{slice_name}] fails its check ")


def test_responses_of_an_earlier_policy_are_not_counted(made):
    path, fake = made
    (n,) = fake.lake.sql("SELECT count(*) FROM samples WHERE slice = 'sound'").row(0)
    old = fake.lake.sql("SELECT * EXCLUDE materialisation_id FROM samples WHERE slice = 'sound'").with_columns(
        sample_id=pl.concat_str(pl.lit("old-"), "sample_id"), model_id=pl.lit("earlier policy"), text=pl.lit(""),
        finish_reason=pl.lit("length"),
    )  # fmt: skip
    fake.lake.commit(Record("student_samples", "sound", "r", "t", "chunk"), [Write("samples", old)])
    assert fake.lake.sql("SELECT count(*) FROM samples WHERE slice = 'sound'").item() == 2 * n
    assert failing(path, fake, "sound") == []


def test_a_truncated_positive_is_damage_unless_the_profile_allows_it(made):
    path, fake = made
    fake.spoil = {}
    fake("filtered_pairs", "truncated", "run", profile=path, on_line=lambda _: None)
    assert failing(path, fake, "truncated", ["filtered_pairs"]) == [("filtered_pairs", "no_truncated_positive")]
    allowing = Path(path).with_name("allowing.yaml")
    allowing.write_text(Path(path).read_text() + "preference: {truncated_positive: true}\n")
    assert failing(str(allowing), fake, "truncated", ["filtered_pairs"]), "it was not allowed when they were made"
    fake("filtered_pairs", "truncated", "run", profile=str(allowing), on_line=lambda _: None)
    assert failing(path, fake, "truncated", ["filtered_pairs"]) == []


def test_training_is_refused_by_any_broken_slice(made):
    path, fake = made
    reason = broken_upstream(fake.lake, load_profile(path), "student_checkpoint", None)
    assert "fails its check" in reason


def test_a_checkpoint_must_start_at_the_reference_keep_its_weights_and_its_training_set(tmp_path, monkeypatch):
    path = str(write_profile(tmp_path / "p", ("a",)))
    fake = Fake()
    for asset in (*SLICED, "student_checkpoint"):
        fake(asset, "a" if asset in SLICED else None, "run", profile=path, on_line=lambda _: None)
    found = lambda: [c for _, c in failing(path, fake, None, ["student_checkpoint"])]  # noqa: E731
    assert found() == []
    weights = tmp_path / "p" / "checkpoints" / "new" / "model.safetensors"
    good = weights.read_text()
    weights.write_text("other weights")
    assert found() == ["weights_intact"]
    weights.unlink()
    assert found() == ["weights_intact"]
    weights.write_text(good)
    assert found() == []
    reason = broken_upstream(fake.lake, load_profile(path), "student_eval", None)
    assert reason is None
    earlier = fake.lake.sql("SELECT min(snapshot_id) AS s FROM lineage.commits WHERE asset = 'queries'")["s"][0]
    fake.spoil["student_checkpoint"] = lambda df: df.with_columns(input_snapshot=pl.lit(earlier, pl.Int64))
    monkeypatch.setattr("fake_worker.TRAINING", "another")
    fake("student_checkpoint", None, "run", profile=path, on_line=lambda _: None)
    assert found() == ["training_set_known"]


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_step_0_may_differ_by_what_training_allowed_in_its_precision(tmp_path, monkeypatch, dtype, precision):
    """The first batch of three pairs has responses of 2 tokens; the second checkpoint starts just outside."""
    models = {"student": "student", "teacher": "teacher", "dtype": dtype}
    path = str(write_profile(tmp_path / "p", ("a",), models=models, training={"precision": precision}))
    fake = Fake()
    bound = 2 * drift.step_0_bound(precision, 0.1, 2)
    for name, margin, dpo, expected in [
        ("inside", 0.9, -0.9, []),
        ("margin", 1.1, 0, ["starts_at_reference"]),
        ("loss", 0, 1.1, ["starts_at_reference"]),
    ]:
        values = {"margin": margin * bound, "dpo": math.log(2) + dpo * bound}
        monkeypatch.setattr("fake_worker.TRAINING", name)
        monkeypatch.setattr("fake_worker.STEP_0", values)
        for asset in (*SLICED, "student_checkpoint"):
            fake(asset, "a" if asset in SLICED else None, "run", profile=path, on_line=lambda _: None)
        assert failing(path, fake, None, ["student_checkpoint"]) == [("student_checkpoint", c) for c in expected]
