"""Content-addressed ids: the same content has the same id on every machine, so a later run finds the rows of an earlier
one and does not make them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def digest(*parts: Any) -> str:
    """128-bit BLAKE2b hash, in hexadecimal, of `parts`, which must be JSON-serialisable.

    The order of a dict's keys does not matter. The boundaries between parts do: ("ab", "c") is not ("a", "bc")."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def query_id(messages: list[dict[str, str]]) -> str:
    """Id of a query: hash of the roles and contents of its messages."""
    return digest("query", [{"role": m["role"], "content": m["content"]} for m in messages])


def sample_id(query_id: str, model_id: str, sampling_id: str, index: int) -> str:
    """Id of the `index`-th response of a model to a query with these sampling settings (`identity.sampling_id`)."""
    return digest("sample", query_id, model_id, sampling_id, index)


def pair_id(chosen_id: str, rejected_id: str) -> str:
    """Id of a pair, from the sample ids of its responses."""
    return digest("pair", chosen_id, rejected_id)


def seed_from(*parts: Any) -> int:
    """A seed in [0, 2^63) derived from content, so that no draw depends on batch composition or order."""
    return int(digest("seed", *parts)[:16], 16) >> 1


def content_version(ids: Iterable[str], *, in_order: bool = False) -> str:
    """Data version of a set of rows: `digest("content", sorted(ids))`, whatever order the ids come in.

    With `in_order` the ids must come sorted; they are then hashed one by one and not kept in memory."""
    content = hashlib.blake2b(b'["content",[', digest_size=16)
    separator = b""
    for row_id in ids if in_order else sorted(ids):
        content.update(separator + json.dumps(row_id, ensure_ascii=False).encode())
        separator = b","
    content.update(b"]]")
    return content.hexdigest()


def query_file_id(path: Path) -> str:
    """Hash of a query file's name and content: `digest("file", name, content in hexadecimal)`.

    A file is read again only when its size or modification time has changed since this process read it."""
    key = ("query file", *_stat_key(path))
    if key not in _hashes:
        content = hashlib.blake2b(f'["file",{json.dumps(path.name, ensure_ascii=False)},"'.encode(), digest_size=16)
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                content.update(piece.hex().encode())
        content.update(b'"]')
        _hashes[key] = content.hexdigest()
    return _hashes[key]


def model_id(path: Path | str) -> str:
    """Hash of a model folder's weights, config and tokenizer; its path and its card do not matter.

    A file is hashed again only when its size or modification time has changed since this process hashed it.
    Raises FileNotFoundError naming the folder when it holds no config.json or no safetensors weights."""
    folder = Path(path)
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not weights or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model at {folder}: expected a folder with config.json, *.safetensors and tokenizer files; "
            "check `models` in the profile"
        )
    files = [
        folder / "config.json",
        *(folder / n for n in TOKENIZER_FILES if (folder / n).exists()),
        *weights,
    ]
    return digest("model", [[f.name, _file_hash(f)] for f in files])


_hashes: dict[tuple[str, str, int, int], str] = {}
"""What is hashed of a file, and its `_stat_key` -> the hash."""


def _stat_key(path: Path) -> tuple[str, int, int]:
    stat = os.stat(path)
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _file_hash(path: Path) -> str:
    key = ("content", *_stat_key(path))
    if key not in _hashes:
        with open(path, "rb") as f:
            _hashes[key] = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return _hashes[key]
