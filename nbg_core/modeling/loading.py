"""Models, tokenizers and their configurations from folders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nbg_core.modeling.config_file import text_config_value


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder.

    Raises FileNotFoundError without a folder, ValueError if it cannot be read or has no chat template or end-of-turn
    token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(_folder(path), trust_remote_code=trust_remote_code)
    except FileNotFoundError:
        raise
    except Exception as e:  # transformers' own errors name neither folder nor file
        raise ValueError(
            f"the tokenizer in {path} cannot be read: {e}; restore its tokenizer.json and tokenizer_config.json"
        ) from e
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {path} needs a chat template and an end-of-turn (eos) token")
    return tokenizer


def load_model(path: Path | str, *, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in a folder, for inference, on the GPU if there is one.

    Raises FileNotFoundError without a folder, ValueError for weights that cannot be read."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            _folder(path), dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except SafetensorError as e:  # names no file
        raise ValueError(f"the weights in {path} cannot be read: {e}; restore its *.safetensors files") from e
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # its decorator loses the type
    return model.eval()


def _folder(path: Path | str) -> Path:
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(
            f"no model at {path}: expected a folder with config.json; check `models` in the profile"
        )
    return Path(path)


def generation_config(path: Path | str, *, trust_remote_code: bool = False) -> GenerationConfig:
    """The generation config of a model folder: the same that the loaded model has."""
    if (_folder(path) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(path)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))


def context_length(path: Path | str) -> int | None:
    """The longest sequence that the model in a folder takes, in tokens; None if its config does not say."""
    return text_config_value(_folder(path), "max_position_embeddings")


def output_width(path: Path | str, *, trust_remote_code: bool = False) -> int:
    """Width of the logits of the model in a folder: the tokenizer's ids, and possibly padding."""
    return AutoConfig.from_pretrained(_folder(path), trust_remote_code=trust_remote_code).get_text_config().vocab_size


def check_same_tokenizer(student: Path | str, teacher: Path | str, *, trust_remote_code: bool = False) -> int:
    """Check that two models have the same tokenizer, and return its number of token ids.

    Vocabularies and special ids are compared, not names: a teacher's distribution means nothing over another
    vocabulary. Raises ValueError naming the first difference."""
    a = load_tokenizer(student, trust_remote_code=trust_remote_code)
    b = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    one, two = a.get_vocab(), b.get_vocab()
    differences = sorted(t for t in one.keys() | two.keys() if one.get(t) != two.get(t))
    if differences:
        t = differences[0]
        raise ValueError(
            f"teacher {teacher} and student {student} have different tokenizers: {len(differences)} tokens differ, "
            f"first {t!r} (student id {one.get(t)}, teacher id {two.get(t)}); use a teacher of the student's family"
        )
    special = set(a.all_special_ids) ^ set(b.all_special_ids)
    special -= {a.pad_token_id, b.pad_token_id}  # padding is masked, so it may differ
    if special:
        tokens = ", ".join(repr(t) for t in a.convert_ids_to_tokens(sorted(special)))
        raise ValueError(
            f"teacher {teacher} and student {student} have different special tokens: only one of them has {tokens}; "
            "use models with the same special tokens"
        )
    if a.eos_token_id != b.eos_token_id:
        raise ValueError(
            f"teacher {teacher} ends a turn with token {b.eos_token_id}, student {student} with {a.eos_token_id}; "
            "use models with the same special tokens"
        )
    return len(a)
