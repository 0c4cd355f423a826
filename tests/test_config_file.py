"""Values of config.json: of the language model's own section where a model has one (composite models)."""

from __future__ import annotations

import json

import pytest
from fake_worker import Fake, write_profile
from transformers import Gemma3Config

from nbg_core.checks.checks import checks_of
from nbg_core.checks.violations import Subject
from nbg_core.config.load import load_profile
from nbg_core.modeling.config_file import text_config_value
from nbg_core.modeling.loading import context_length, output_width
from nbg_core.training.engine import switch_off_dropout


def write(folder, config: dict):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"vocab_size": 64}, 64),
        ({"text_config": {"vocab_size": 64}}, 64),
        ({"vocab_size": 9, "text_config": {"vocab_size": 64}, "vision_config": {"vocab_size": 7}}, 64),
        ({"vocab_size": 64, "text_config": {"hidden_size": 7}}, 64),
        ({"thinker_config": {"text_config": {"vocab_size": 64}}}, 64),
        ({"text_config": {"vocab_size": None}}, None),
        ({"vision_config": {"vocab_size": 7}}, None),
        ({}, None),
    ],
)
def test_the_language_models_own_value_counts(tmp_path, config, size):
    assert text_config_value(write(tmp_path, config), "vocab_size") == size


def test_the_context_of_a_composite_model_is_its_language_models(tmp_path):
    assert context_length(write(tmp_path, {"text_config": {"max_position_embeddings": 77}})) == 77
    assert context_length(write(tmp_path, {"model_type": "x"})) is None


def test_it_agrees_with_transformers_on_a_composite_model(tmp_path):
    text = {"vocab_size": 99, "hidden_size": 8, "max_position_embeddings": 77}
    config = Gemma3Config(text_config=text)
    config.save_pretrained(tmp_path)
    for key in text:
        assert text_config_value(tmp_path, key) == getattr(config.get_text_config(), key)
    assert output_width(tmp_path) == 99 and context_length(tmp_path) == 77


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"vocab_size": 9, "text_config": {"vocab_size": 64}}, None),
        ({"vocab_size": 64, "text_config": {"vocab_size": 9}}, ""),
        ({"text_config": {"hidden_size": 9}}, "config.json does not say vocab_size"),
        ({"text_config": {"vocab_size": None}}, "config.json does not say vocab_size"),
    ],
)
def test_the_check_of_tokens_holds_them_to_the_language_models_vocabulary(tmp_path, config, why):
    """The fake worker's tokens go up to 63."""
    path = write_profile(tmp_path / "p", ("a",))
    write(tmp_path / "p" / "student", config)
    fake = Fake()
    for asset in ("queries", "student_samples"):
        fake(asset, "a", "run", profile=str(path), on_line=lambda _: None)
    (check,) = [c for c in checks_of("student_samples") if c.name == "tokens_in_vocabulary"]
    found = check.violations(Subject(fake.lake, load_profile(path), "student_samples", "a"))
    assert found.is_empty() == (why is None)
    if why:
        assert found["why"].item().endswith(why)


def test_no_dropout_is_left_in_a_composite_model():
    config = Gemma3Config(text_config={"attention_dropout": 0.1, "hidden_size": 8})
    config.classifier_dropout = 0.2
    switch_off_dropout(config)
    assert (config.text_config.attention_dropout, config.classifier_dropout) == (0.0, 0.0)
