"""Values of a model folder's config.json, without loading the model.

Multimodal and other composite models keep the language model's configuration in a section of its own; transformers has
one method for it (`get_text_config`), but importing transformers takes seconds, and checks run in Dagster's process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "decoder", "generator", "thinker_config")
"""Sections that hold a language model's configuration: those that transformers' `get_text_config` knows,
and other names that model families use."""


def text_config_value(folder: Path, key: str) -> Any:
    """The value of `key` for the language model in a folder: in its own section, else at the top level of config.json.

    None when neither has it, or it is null. Raises FileNotFoundError without a config.json."""
    config = json.loads((folder / "config.json").read_text())
    found = config.get(key)
    while (section := next((config[s] for s in TEXT_SECTIONS if isinstance(config.get(s), dict)), None)) is not None:
        config = section
        found = config.get(key, found)
    return found
