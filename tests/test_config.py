"""Profiles: the shipped ones are valid; a wrong one is refused with the place and the remedy."""

from pathlib import Path
from typing import get_args

import dagster as dg
import pytest

from nbg_core.config import identity
from nbg_core.config.load import ProfileError, load_profile, reference
from nbg_core.config.profile import PROJECT_ROOT, Profile

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
        (MODELS + "training: {loss: {w_dpo: -1}}", "training.loss.w_dpo = -1: .*greater than or equal to 0"),
        (MODELS + "training: {loss: {w_pos: .nan}}", "training.loss.w_pos = nan: .*finite"),
        (MODELS + "training: {learning_rate: .inf}", "training.learning_rate = inf: .*finite"),
        (MODELS + "training: {adam_betas: [2, 5]}", "training.adam_betas.0 = 2: .*less than 1; training.adam_betas.1"),
        (MODELS + "preference: {weights: {verifier: -1}}", "preference.weights.verifier = -1: .*equal to 0"),
        (MODELS + "lake: {catalog: 'mysql:x'}", "lake.catalog = 'mysql:x': .*sqlite:PATH or postgres:"),
        (MODELS + "preference: {weights: {}}", "no scorer with a weight; set one of verifier, teacher_loglik above 0"),
        (MODELS + "preference: {weights: {verifier: 0}}", "no scorer with a weight"),
        (MODELS + "refresh: {cron: nonsense}", "cron 'nonsense' does not have the fields minute, hour, day, month"),
        (MODELS + "refresh: {cron: 0 24 * * *}", "'24' is not a hour; use .* numbers from 0 to 23"),
        (MODELS + "refresh: {cron: 0 3 * * mon-}", "'mon-' is not a weekday"),
        (MODELS + "refresh: {cron: '*/0 3 * * *'}", r"'\*/0' is not a minute"),
        (MODELS + "refresh: {timezone: Mars}", "timezone 'Mars' is not known; use a name like 'UTC'"),
        (MODELS + "training: {offload_optimizer: true}", "offload_optimizer needs zero_stage 1, 2 or 3"),
        (MODELS + "training: {lora: {rnak: 8}}", "unknown key 'training.lora.rnak'; did you mean 'rank'"),
        (MODELS + "training: {lora: {rank: 0}}", "training.lora.rank = 0: .*greater than or equal to 1"),
        (
            MODELS + "teacher: {engine: vllm}",
            "teacher.engine 'vllm' gives the most probable entries .*; set teacher.m_tail to 0, teacher.min_weight to "
            "0, training.loss.estimator to 'bucket', or teacher.engine to 'transformers'",
        ),
        (
            MODELS + "teacher: {engine: vllm, m_tail: 0, min_weight: 0, temperature: 2}\ntraining: {loss: {estimator: "
            "bucket}}",
            "; set teacher.temperature to 1, or",
        ),
        (MODELS + "vllm: {addresses: [localhost:8000]}", "'localhost:8000' is not a base URL; write it like http://"),
        (MODELS + "vllm: {max_in_flight: 0}", "vllm.max_in_flight = 0: .*greater than or equal to 1"),
        (
            "models: {student: a, teacher: b, dtype: bfloat16}",
            "models.dtype 'bfloat16' and training.precision 'fp32' .*set training.precision to 'bf16', or change",
        ),
        (MODELS + "training: {precision: bf16}", "models.dtype 'float32' .*set training.precision to 'fp32'"),
        ("- a list", "a profile is a mapping"),
        ("a: [", "not valid YAML"),
        (MODELS + "training: {epochs: 1, seed: 2, epochs: 1}", "key 'epochs' appears twice"),
    ],
)
def test_a_wrong_profile_names_file_key_and_remedy(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(ProfileError, match=expected) as e:
        load_profile(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("cron", ["0 3 * * *", "*/15 * * * *", "0,30 9-17 1-15/2 1,12 1-5", "59 23 31 12 7"])
def test_cron_lines_that_dagster_takes_are_taken(tmp_path, cron):
    assert dg.ScheduleDefinition(job_name="any", cron_schedule=cron).cron_schedule == cron
    profile = load_profile(write(tmp_path, MODELS + f"refresh: {{cron: '{cron}', timezone: Europe/Berlin}}"))
    assert profile.refresh.cron == cron


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


def changed(profile: Profile, section: str, **values) -> Profile:
    return profile.model_copy(update={section: getattr(profile, section).model_copy(update=values)})


def test_ids_of_settings_change_with_what_matters_only():
    base = load_profile("embedded")
    assert identity.sampling_id(changed(base, "sampling", n_student=16, batch_size=3)) == identity.sampling_id(base)
    assert identity.sampling_id(changed(base, "sampling", temperature=0.5)) != identity.sampling_id(base)
    assert identity.storage_id(changed(base, "teacher", batch_tokens=7)) == identity.storage_id(base)
    assert identity.answering_id(changed(base, "evaluation", batch_size=7)) == identity.answering_id(base)
    assert identity.answering_id(changed(base, "evaluation", max_tokens=7)) != identity.answering_id(base)
    of_vllm = changed(base, "sampling", backend="vllm")
    for name in ("sampling_id", "answering_id"):
        assert getattr(identity, name)(of_vllm) != getattr(identity, name)(base)
        assert getattr(identity, name)(changed(of_vllm, "vllm", version="1.0")) != getattr(identity, name)(of_vllm)
        assert getattr(identity, name)(changed(of_vllm, "vllm", addresses=["http://h"], max_in_flight=1)) == getattr(
            identity, name
        )(of_vllm)
    assert identity.storage_id(changed(of_vllm, "vllm", version="1.0")) == identity.storage_id(base)
    scored = changed(base, "teacher", engine="vllm")
    assert (
        identity.storage_id(changed(scored, "vllm", version="1.0"))
        != identity.storage_id(scored)
        != identity.storage_id(base)
    )
    rounded = changed(base, "models", dtype="bfloat16")
    for name in ("sampling_id", "storage_id", "scoring_id", "answering_id"):
        assert getattr(identity, name)(rounded) != getattr(identity, name)(base)


def test_arguments_of_a_server_that_change_its_answers_change_the_key():
    base = changed(load_profile("embedded"), "sampling", backend="vllm")

    def key(*args: str, **vllm) -> str:
        return identity.sampling_id(changed(base, "vllm", args=args, **vllm))

    assert key("--tensor-parallel-size=8", "--gpu_memory_utilization=0.5") == key()
    assert len({key(), key("--quantization=fp8"), key("--kv-cache-dtype=fp8"), key("--dtype=half")}) == 4
    assert key("--quantization=fp8", addresses=("http://h",)) == key()  # they are another's
    with pytest.raises(ValueError, match="'8' is not an argument; write each as --NAME or --NAME=VALUE"):
        type(base.vllm)(args=("--tensor-parallel-size", "8"))
    for arg in ("--port=1", "--served_model_name=x", "--load-format=dummy"):
        with pytest.raises(ValueError, match=f"'{arg}' is not yours to set"):
            type(base.vllm)(args=(arg,))
    with pytest.raises(ValueError, match="--api-key would be stored .*: set VLLM_API_KEY instead") as refused:
        type(base.vllm)(args=("--api-key=sk-123456789",))
    assert "sk-123456789" not in refused.value.errors()[0]["msg"]
    with pytest.raises(ValueError, match="a setting of its own: vllm.max_model_len"):
        type(base.vllm)(args=("--max-model-len=9",))


def test_another_version_of_what_computes_is_another_key(monkeypatch):
    base = load_profile("embedded")
    ids = [identity.sampling_id(base), identity.storage_id(base), identity.answering_id(base)]
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.0")
    assert not set(ids) & {identity.sampling_id(base), identity.storage_id(base), identity.answering_id(base)}


def test_a_training_is_the_same_however_its_sums_are_shared_out():
    base = load_profile("embedded").training
    shared_out = dict(
        n_processes=8, zero_stage=3, offload_optimizer=True, micro_batch_tokens=7, gradient_checkpointing=True,
        sequence_parallel=2, hostfile="hosts", save_every=1, compile=True,
    )  # fmt: skip
    assert base.model_copy(update=shared_out).identity_fields() == base.identity_fields()
    decide = base.identity_fields().keys()
    assert decide == type(base).model_fields.keys() - shared_out.keys()  # a new setting decides, unless it is named
    assert {"loss", "global_batch_pairs", "precision", "lora", "seed"} <= decide
    for change in (dict(precision="bf16"), dict(lora={"rank": 2}), dict(global_batch_pairs=3)):
        assert type(base).model_validate({**base.model_dump(), **change}).identity_fields() != base.identity_fields()


def test_compiled_layers_are_not_taken_apart():
    with pytest.raises(ValueError, match="compile needs zero_stage 0, 1 or 2"):
        load_profile("embedded").training.model_validate({"compile": True, "zero_stage": 3})


def test_ranks_that_share_sequences_are_whole_groups():
    with pytest.raises(ValueError, match="n_processes=6 is not a multiple of sequence_parallel=4"):
        load_profile("embedded").training.model_validate({"n_processes": 6, "sequence_parallel": 4})


def test_the_reference_in_the_docs_is_that_of_the_code():
    assert (PROJECT_ROOT / "docs" / "profile.md").read_text().endswith(reference()), "run `make docs`"
    assert all(line.startswith("| `") and line.endswith(" |") for line in reference().splitlines()[2:])
