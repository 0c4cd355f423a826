"""Loading models and tokenizers, and the padded forward pass.

Shapes: N sequences, L padded length, T response positions of all sequences
together, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder.

    Raises FileNotFoundError without a folder, ValueError if it cannot be read or has no chat template or end-of-turn
    token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(_folder(path), trust_remote_code=trust_remote_code)
    except FileNotFoundError:
        raise
    except Exception as e:  # the reader's own errors name neither folder nor file
        raise ValueError(
            f"the tokenizer in {path} cannot be read: {e}; restore its tokenizer.json and tokenizer_config.json"
        ) from e
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {path} needs a chat template and an end-of-turn (eos) token")
    return tokenizer


def load_model(path: Path | str, *, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in a folder, for inference, on the GPU if there is one."""
    model = AutoModelForCausalLM.from_pretrained(
        _folder(path), dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _folder(path: Path | str) -> Path:
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(
            f"no model at {path}: expected a folder with config.json; check `models` in the profile"
        )
    return Path(path)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a chat, ready for the assistant's turn."""
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)


def stop_ids(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a response: the generation config's, and the tokenizer's end-of-turn."""
    configured = config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def generation_config(path: Path | str, *, trust_remote_code: bool = False) -> GenerationConfig:
    """The generation config of a model folder, as its loaded model has it."""
    if (_folder(path) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(path)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))


def context_length(path: Path | str) -> int | None:
    """Longest sequence the model in a folder takes, in tokens; None if its config does not say."""
    config = json.loads((_folder(path) / "config.json").read_text())
    return config.get("max_position_embeddings")


def output_width(path: Path | str, *, trust_remote_code: bool = False) -> int:
    """Columns of the output matrix of the model in a folder: the tokenizer's ids, and perhaps padding."""
    return AutoConfig.from_pretrained(_folder(path), trust_remote_code=trust_remote_code).get_text_config().vocab_size


def check_same_tokenizer(student: Path | str, teacher: Path | str, *, trust_remote_code: bool = False) -> int:
    """The number of token ids both models share.

    Compared by content (vocabulary and special ids), not by name: a teacher's distribution means nothing over
    another vocabulary. Raises ValueError naming the first difference."""
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
            f"{tokens} special to only one of teacher {teacher} and student {student}; use models with the same "
            "special tokens"
        )
    if a.eos_token_id != b.eos_token_id:
        raise ValueError(
            f"teacher {teacher} ends a turn with token {b.eos_token_id}, student {student} with {a.eos_token_id}; "
            "use models with the same special tokens"
        )
    return len(a)


@dataclass(frozen=True)
class Padded:
    """Right-padded sequences, and where their response tokens are predicted."""

    ids: Tensor
    """[N, L] int64."""
    mask: Tensor
    """[N, L] int64: 1 where there is a token."""
    rows: Tensor
    """[T] int64 into N * L: row p - 1 + r of a sequence with p prompt tokens predicts its response token r; in order
    of sequence, then position."""

    def to(self, device: torch.device | str) -> Padded:
        return Padded(self.ids.to(device), self.mask.to(device), self.rows.to(device))


def pad(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int) -> Padded:
    """One sequence per response, its prompt before it: every prompt is computed as often as it has responses.

    Without responses: one token, and no rows."""
    if len(responses) == 0:
        return Padded(torch.full((1, 1), pad_id), torch.ones((1, 1), dtype=torch.long), torch.zeros(0).long())
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), length), dtype=torch.long)
    rows = []
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        n = len(p) + len(r)
        ids[i, :n] = torch.tensor([*p, *r])
        mask[i, :n] = 1
        rows.append(torch.arange(i * length + len(p) - 1, i * length + n - 1))
    return Padded(ids, mask, torch.cat(rows))


def padded_hidden(model: PreTrainedModel, inputs: Padded) -> Tensor:
    """Last hidden states [T, H] at `inputs.rows`: the plain forward pass, for any architecture."""
    hidden = model.base_model(input_ids=inputs.ids, attention_mask=inputs.mask, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[inputs.rows]
