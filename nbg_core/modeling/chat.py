"""Chats as token ids, and the token ids that end a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a chat, ready for the assistant's turn."""
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    return cast(list[int], ids)  # of one chat, tokenized, without a dict


def stop_ids(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a response: the generation config's, and the tokenizer's end-of-turn."""
    configured = config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}
