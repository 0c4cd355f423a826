"""Chats as token ids, and the token ids that end a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding id or, if it has none, its end-of-turn id."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a chat, ending where the assistant's turn begins."""
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    return cast(list[int], ids)  # what it returns for one chat and these arguments


def stop_ids(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a response: the generation config's, and the tokenizer's end-of-turn."""
    configured = config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}
