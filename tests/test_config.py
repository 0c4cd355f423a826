"""Profiles: the shipped ones are valid; a wrong one is refused with the place and the remedy."""

from pathlib import Path
from typing import get_args

import pytest

from nbg_core.config import PROJECT_ROOT, Profile, ProfileError, load_profile, reference

MODELS = "models: {student: a, teacher: b}\n"


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((PROJECT_ROOT / "profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_profiles_are_valid(path):
    assert load_profile(path.stem).name == path.stem


def test_the_published_setting_is_a_profile():
    p = load_profile("nbg4_3b")
    assert (p.models.teacher.name, p.models.student.name) == ("NBG3.5-Pro", "NBG4-3B-SFT")
    assert (p.sampling.backend, p.training.zero_stage) == ("vllm", 3)
    assert (p.training.loss.w_dpo, p.training.loss.w_pos, p.training.loss.w_neg) == (1, 1, 1)


def test_the_environment_chooses_the_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("NBG_PROFILE", str(write(tmp_path, MODELS)))
    assert load_profile().name == "p"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MODELS + "training: {loss: {bata: 0.2}}", r"unknown key 'training.loss.bata'; did you mean 'beta'"),
        (MODELS + "smapling: {}", "unknown key 'smapling'; did you mean 'sampling'"),
        ("name: x", "missing key 'models'"),
        (MODELS + "sampling: {temperature: -1}", r"sampling.temperature = -1: .*greater than or equal to 0"),
        (MODELS + "sampling: {n_student: 1}", "at least 2"),
        (MODELS + "teacher: {m_tail: 0}", "needs teacher.m_tail > 0; or use 'bucket'"),
        (MODELS + "training: {loss: {dpo_variant: ipo, label_smoothing: 0.1}}", "no meaning with dpo_variant 'ipo'"),
        (MODELS + "training: {loss: {divergence: jsd}}", "'jsd' needs estimator 'bucket'"),
        (MODELS + "training: {offload_optimizer: true}", "offload_optimizer needs zero_stage 1, 2 or 3"),
        (MODELS + "training: {lora: {rnak: 8}}", "unknown key 'training.lora.rnak'; did you mean 'rank'"),
        (MODELS + "training: {lora: {rank: 0}}", "training.lora.rank = 0: .*greater than or equal to 1"),
        ("- a list", "a profile is a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_profile_names_file_key_and_remedy(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(ProfileError, match=expected) as e:
        load_profile(path)
    assert str(path) in str(e.value)


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ProfileError, match="embedded"):
        load_profile("embeded")


def test_every_setting_is_documented():
    def undocumented(model, prefix=""):
        for name, field in model.model_fields.items():
            if not field.description:
                yield prefix + name
            for kind in (field.annotation, *get_args(field.annotation)):
                if hasattr(kind, "model_fields"):
                    yield from undocumented(kind, f"{prefix}{name}.")

    assert list(undocumented(Profile)) == []


def test_ids_of_settings_change_with_what_matters_only():
    base = load_profile("embedded")
    more = base.sampling.model_copy(update={"n_student": 16, "batch_size": 3})
    hotter = base.sampling.model_copy(update={"temperature": 0.5})
    assert more.sampling_id() == base.sampling.sampling_id() != hotter.sampling_id()


def test_a_training_is_the_same_however_its_sums_are_shared_out():
    base = load_profile("embedded").training
    shared_out = dict(
        n_processes=8, zero_stage=3, offload_optimizer=True, micro_batch_tokens=7, gradient_checkpointing=True,
        hostfile="hosts", save_every=1,
    )  # fmt: skip
    assert base.model_copy(update=shared_out).deciding() == base.deciding()
    decide = base.deciding().keys()
    assert decide == type(base).model_fields.keys() - shared_out.keys()  # a new setting decides, unless it is named
    assert {"loss", "global_batch_pairs", "precision", "lora", "seed"} <= decide
    for change in (dict(precision="bf16"), dict(lora={"rank": 2}), dict(global_batch_pairs=3)):
        assert type(base).model_validate({**base.model_dump(), **change}).deciding() != base.deciding()


def test_the_reference_in_the_docs_is_that_of_the_code():
    assert (PROJECT_ROOT / "docs" / "profile.md").read_text().endswith(reference())
