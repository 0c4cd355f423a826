"""An unknown name is an error that names the known ones: in the profile, and in the function that uses it.

Settings are built with `model_construct`, which checks nothing, so that the function itself must refuse.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import polars as pl
import pytest
import torch
from fake_worker import write_profile

from nbg_assets import assets as dagster_assets
from nbg_core import assets
from nbg_core.checks import checks, violations
from nbg_core.config import identity
from nbg_core.config.load import ProfileError, load_profile
from nbg_core.config.profile import ENGINES
from nbg_core.config.slices import SUFFIXES
from nbg_core.config.training import TrainingSettings
from nbg_core.lake import tables
from nbg_core.lake.attach import LakeError
from nbg_core.lake.lake import Lake
from nbg_core.lineage.run import Run
from nbg_core.losses.divergence import DIVERGENCES
from nbg_core.losses.dpo import DPO_VARIANTS, sequence_dpo_loss
from nbg_core.losses.settings import LossSettings
from nbg_core.losses.targets import TeacherTargets
from nbg_core.losses.token_divergence import bucket_divergence, divergence_of
from nbg_core.preference.scoring import StageContext, score_samples
from nbg_core.queries.readers import READERS, read_rows
from nbg_core.reference.drift import step_0_bound
from nbg_core.sampling.backends import open_sampler
from nbg_core.scorers.scorers import SCORERS
from nbg_core.scorers.verifiers import VERIFIERS, SpecError, verify
from nbg_core.teacher.engine import open_engine
from nbg_core.training.engine import SCHEDULES, learning_rate


def unchecked(section, **values):
    """A copy of a section with values that pydantic would refuse."""
    return section.model_copy(update=values)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return load_profile(write_profile(tmp_path_factory.mktemp("unknown") / "p", ("a",)))


@pytest.fixture(scope="module")
def run(profile):
    return Run(profile, Lake.of(profile), log=lambda line: None)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("training: {loss: {dpo_variant: x}}", "unknown DPO variant 'x'; known: sigmoid, sigmoid_norm, ipo, hinge"),
        ("training: {loss: {divergence: x}}", "unknown divergence 'x'; known: forward, reverse, jsd"),
        ("training: {loss: {estimator: x}}", "training.loss.estimator = 'x': .*'sampled_tail' or 'bucket'"),
        ("training: {schedule: x}", "training.schedule = 'x': .*'cosine', 'linear' or 'constant'"),
        ("training: {precision: x}", "training.precision = 'x': .*'fp32' or 'bf16'"),
        ("preference: {weights: {x: 1}}", "unknown scorer 'x'; known: verifier, teacher_loglik"),
        ("sampling: {backend: x}", "sampling.backend = 'x': .*'transformers' or 'vllm'"),
        ("teacher: {engine: x}", "teacher.engine = 'x': .*'transformers' or 'vllm'"),
    ],
)
def test_the_profile_names_what_is_known(tmp_path, text, known):
    path = tmp_path / "p.yaml"
    path.write_text("models: {student: a, teacher: b}\n" + text)
    with pytest.raises(ProfileError, match=known):
        load_profile(path)


def test_the_loss_refuses_what_it_does_not_know():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="unknown DPO variant 'x'; known: sigmoid, sigmoid_norm, ipo, hinge"):
        sequence_dpo_loss(one, one, one, one, variant="x")
    row = torch.zeros(1, 1)
    targets = TeacherTargets(row.long(), row, row == 0, row != 0, torch.zeros(1))
    with pytest.raises(ValueError, match="unknown divergence 'x'; known: forward, reverse, jsd"):
        bucket_divergence(torch.zeros(1, 3), targets, kind="x")
    for change, known in [
        ({"divergence": "x"}, "unknown divergence 'x'; known: forward, reverse, jsd"),
        ({"estimator": "x"}, "unknown estimator 'x'; known: sampled_tail, bucket"),
    ]:
        with pytest.raises(ValueError, match=known):
            divergence_of(row, torch.zeros(1), targets, unchecked(LossSettings(), **change))


def test_training_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown training.schedule 'x'; known: constant, linear, cosine"):
        learning_rate(unchecked(TrainingSettings(), schedule="x"), 10)
    with pytest.raises(ValueError, match="unknown training.precision 'x'; known: fp32, bf16"):
        step_0_bound("x", 0.1, np.ones(1))


def test_stages_refuse_backends_and_engines_that_they_do_not_know(profile, run):
    sampling, teacher = unchecked(profile.sampling, backend="x"), unchecked(profile.teacher, engine="x")
    wrong = unchecked(profile, sampling=sampling, teacher=teacher)
    other = dataclasses.replace(run, profile=profile)
    other.profile = wrong
    folder = profile.resolve(profile.models.teacher)
    for use, known in [
        (lambda: identity.sampling_id(wrong), "unknown engine 'x'; known: transformers, vllm"),
        (lambda: identity.storage_id(wrong), "unknown engine 'x'; known: transformers, vllm"),
        (lambda: open_sampler(other, folder, 1).__enter__(), "unknown sampling.backend 'x'; known: transformers, vllm"),
        (lambda: open_engine(other, folder).__enter__(), "unknown teacher.engine 'x'; known: transformers, vllm"),
    ]:
        with pytest.raises(ValueError, match=known):
            use()


def test_scoring_refuses_a_scorer_and_an_identity_that_it_does_not_know(profile, run):
    wrong = dataclasses.replace(run, profile=profile)
    wrong.profile = unchecked(profile, preference=unchecked(profile.preference, weights={"x": 1.0}))
    with pytest.raises(ValueError, match="unknown scorer 'x'; known: verifier, teacher_loglik"):
        score_samples(wrong, "a", None, [])
    with pytest.raises(ValueError, match="unknown scorer 'x'; known: verifier, teacher_loglik"):
        assets.settings_of("filtered_pairs", wrong.profile, "policy", "a")
    with pytest.raises(ValueError, match="unknown identity 'x'; known: teacher, scoring_id, loglik_engine"):
        StageContext(run, "x").identity("x")


def test_a_column_of_a_type_that_the_lake_does_not_hold():
    with pytest.raises(ValueError, match="unknown type of a column 'Duration'; known: String, Int32"):
        tables.sql_type(pl.List(pl.Duration("us")))


def test_a_verifier_and_its_arguments_that_are_unknown():
    with pytest.raises(SpecError, match="unknown verifier 'exakt'; did you mean 'exact'"):
        verify("1", "1", "exakt", {}, "")
    with pytest.raises(SpecError, match="exact takes no 'x'; known: case_sensitive"):
        verify("1", "1", "exact", {"x": 1}, "")


def test_the_registry_refuses_what_it_does_not_know(profile, monkeypatch):
    with pytest.raises(ValueError, match="unknown asset 'x'; known: queries, student_samples"):
        assets.get("x")
    with pytest.raises(ValueError, match="unknown asset 'x'; known: queries"):
        assets.partition_name("x", "a")
    asset = dataclasses.replace(assets.get("queries"), checks=("x",))
    monkeypatch.setitem(assets.BY_NAME, "queries", asset)
    with pytest.raises(ValueError, match="unknown check 'x'; known: no_train_eval_overlap"):
        checks.checks_of("queries")
    with pytest.raises(ValueError, match="unknown plot 'x'; known: response lengths"):
        dagster_assets._make(dataclasses.replace(asset, checks=(), plots=("x",)))


def test_a_check_of_scored_rows_knows_which_asset_they_are_of(profile, run):
    subject = violations.Subject(run.lake, profile, "student_samples", "a")
    with pytest.raises(ValueError, match="unknown asset that a model scores 'student_samples'; known: teacher_logits"):
        violations.not_scored_once(subject)


def test_columns_catalogs_and_files_of_an_unknown_kind(tmp_path):
    rows = tables.frame("scores", [])
    with pytest.raises(ValueError, match="table scores declares no column x"):
        tables.validate("scores", rows.with_columns(x=1))
    with pytest.raises(ValueError, match="the rows for table scores lack its columns score"):
        tables.validate("scores", rows.drop("score"))
    with pytest.raises(LakeError, match="starts with 'mysql'; use 'sqlite:PATH' or 'postgres:"):
        Lake("mysql:x", str(tmp_path / "files")).create()
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    with pytest.raises(ValueError, match="unknown suffix of a query file '.csv'; known: .jsonl, .parquet"):
        read_rows(tmp_path / "a.csv")


def test_a_table_has_every_name_that_the_profile_takes():
    fields = TrainingSettings.model_fields
    assert set(SCHEDULES) == set(get_args(fields["schedule"].annotation))
    assert set(ENGINES) == {"transformers", "vllm"} and set(READERS) == set(SUFFIXES)
    for table in (DPO_VARIANTS, DIVERGENCES, SCORERS, VERIFIERS, checks.CHECKS, assets.BY_NAME):
        assert all(name == row.name for name, row in table.items())
