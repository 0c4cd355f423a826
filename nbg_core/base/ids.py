"""Content-addressed ids: the same content has the same id on every machine, so a second run finds its own work."""

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
    """128-bit hex hash of JSON-able parts; dict order does not matter, part boundaries do."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def query_id(messages: list[dict[str, str]]) -> str:
    return digest("query", [{"role": m["role"], "content": m["content"]} for m in messages])


def sample_id(query: str, model: str, sampling: str, index: int) -> str:
    return digest("sample", query, model, sampling, index)


def pair_id(chosen: str, rejected: str) -> str:
    return digest("pair", chosen, rejected)


def seed_from(*parts: Any) -> int:
    """A seed in [0, 2^63) derived from content, so that no draw depends on batch composition or order."""
    return int(digest("seed", *parts)[:16], 16) >> 1


def content_version(ids: Iterable[str], *, in_order: bool = False) -> str:
    """Data version of a set of rows: a digest of their ids, order-free. Ids that come `in_order` are not held.

    It is `digest("content", sorted(ids))`."""
    text = hashlib.blake2b(b'["content",[', digest_size=16)
    between = b""
    for one in ids if in_order else sorted(ids):
        text.update(between + json.dumps(one, ensure_ascii=False).encode())
        between = b","
    text.update(b"]]")
    return text.hexdigest()


def query_file_id(path: Path) -> str:
    """Hash of a query file's name and content, whatever its size and age; read in pieces.

    A file is read once per process and change, remembered by size and modification time. The hash is `digest("file",
    name, content in hexadecimal)`."""
    key = _stat_key(path)
    if key not in _hashes:
        text = hashlib.blake2b(f'["file",{json.dumps(path.name, ensure_ascii=False)},"'.encode(), digest_size=16)
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                text.update(piece.hex().encode())
        text.update(b'"]')
        _hashes[key] = text.hexdigest()
    return _hashes[key]


def model_id(path: Path | str) -> str:
    """Hash of a model folder's weights, config and tokenizer (not its path or card).

    Each file is hashed once per process, remembered by size and modification time.
    Raises FileNotFoundError naming the folder when it holds no safetensors weights."""
    folder = Path(path)
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not weights:
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


_hashes: dict[tuple[str, int, int], str] = {}


def _stat_key(path: Path) -> tuple[str, int, int]:
    stat = os.stat(path)
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _file_hash(path: Path) -> str:
    key = _stat_key(path)
    if key not in _hashes:
        with open(path, "rb") as f:
            _hashes[key] = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return _hashes[key]
