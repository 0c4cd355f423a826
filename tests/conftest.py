"""Fixtures that every test file shares: two tiny random models, and profiles that keep everything under tmp_path.

Torch is imported inside the fixtures, so that tests which need no model start without it.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbg_core.config.profile import Profile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()):
    # Before anything imports Triton: its kernels are then interpreted on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: with several workers the short ones then fill what is left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyModels:
    """Folders of a random teacher and a random student with one tokenizer (byte b is id b, then SPECIAL)."""

    teacher: Path
    student: Path


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's visible characters for bytes
    others = [b for b in range(256) if b not in printable]
    visible = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={visible[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[3],
        additional_special_tokens=SPECIAL[1:3],
        chat_template=TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(folder: Path, *, seed: int, hidden: int = 48, layers: int = 2, context: int = 256) -> Path:
    """A random Llama with the byte tokenizer, as a model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=context,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> TinyModels:
    folder = tmp_path_factory.mktemp("models")
    return TinyModels(save_tiny_model(folder / "teacher", seed=1), save_tiny_model(folder / "student", seed=2))


@pytest.fixture
def make_profile(tmp_path, tiny_models):
    """`make_profile(**overrides)`: a profile on the tiny models with lake, queries and checkpoints under tmp_path.

    An override is a section as a dict, or a field of the profile: make_profile(sampling={"n_student": 4})."""

    def make(**overrides) -> Profile:
        data = {
            "name": "test",
            "root": tmp_path,
            "models": {"student": tiny_models.student, "teacher": tiny_models.teacher},
            "threads": 1,
            **overrides,
        }
        profile = Profile.model_validate(data)
        profile.resolve(profile.paths.queries).mkdir(parents=True, exist_ok=True)
        return profile

    return make
