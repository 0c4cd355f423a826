"""Query files: what a row may say, and what is wrong with one that says something else.

A file is `<slice>.jsonl` (one object a line, UTF-8, blank lines skipped) or `<slice>.parquet`. A row has

| key | |
|---|---|
| prompt, system | text of the user message, and of a system message before it (optional) |
| messages | instead of those: [{"role": 'system', 'user' or 'assistant', "content": text}], the last one user |
| answer | reference answer, text |
| verifier, verifier_args | how responses are checked (nbg_core/preference/verifiers.py); args are an object |
| split | 'train' or 'eval'; without it the query's id decides |
| id | your own id; only checked to be unique |

A key that is null is a key that is absent. In Parquet, `verifier_args` is a struct (its nulls are absent too) or text
holding JSON. All problems of a file are collected and reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from nbg_core.base.ids import query_id
from nbg_core.scorers.verifiers import SpecError, check_spec, nearest

SHOWN = 20
"""Problems written out in an error; the rest is counted."""

KEYS: dict[str, type | tuple[type, ...]] = {
    "prompt": str, "system": str, "messages": list, "answer": str, "verifier": str, "verifier_args": dict,
    "split": str, "id": (str, int),
}  # fmt: skip
ROLES = ("system", "user", "assistant")
JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number",
              type(None): "null"}  # fmt: skip


class QueryFileError(ValueError):
    """A query file that cannot be used: names the file, and for every problem the line, the field and the remedy."""


@dataclass(frozen=True)
class QueryRow:
    """One valid row. `verifier_args` is canonical JSON; `line` is 1-based (the row number in Parquet)."""

    line: int
    query_id: str
    messages: list[dict[str, str]]
    answer: str | None
    verifier: str | None
    verifier_args: str | None
    split: str | None


def read_rows(path: Path) -> list[QueryRow]:
    """The rows of a query file, in order. Raises QueryFileError naming every problem."""
    found = Problems(path)
    rows: list[QueryRow] = []
    lines_of: dict[Any, int] = {}
    for line, value in _parquet(path, found) if path.suffix == ".parquet" else _jsonl(path, found):
        row = _row(value, line, found)
        if (own := value.get("id")) is not None and not isinstance(own, list | dict):
            if own in lines_of:
                found.add(line, "id", f"{own!r} is that of {found.unit} {lines_of[own]} too; ids must be unique")
            lines_of.setdefault(own, line)
        if row:
            rows.append(row)
    found.raise_if_any()
    if not rows:
        raise QueryFileError(
            f"{path} is empty; write one query a line, "
            'e.g. {"prompt": "Add: 1 + 2", "answer": "3", "verifier": "exact"}'
        )
    return rows


class Problems:
    """What is wrong with a file."""

    def __init__(self, path: Path):
        self.path, self.unit = path, "row" if path.suffix == ".parquet" else "line"
        self._found: list[str] = []
        self._count = 0

    def add(self, line: int, field: str | None, what: str) -> None:
        self._count += 1
        if len(self._found) < SHOWN:
            self._found.append(f"{self.unit} {line}" + (f", {field}" if field else "") + f": {what}")

    def raise_if_any(self) -> None:
        if self._count:
            shown = f", the first {SHOWN} are" if self._count > SHOWN else ""
            many = "problem" if self._count == 1 else "problems"
            raise QueryFileError(f"{self.path}: {self._count} {many}{shown}:\n  " + "\n  ".join(self._found))


def _jsonl(path: Path, found: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for line, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except UnicodeDecodeError as e:
            found.add(line, None, f"not valid UTF-8 at byte {e.start + 1} of the line; save the file as UTF-8")
        except json.JSONDecodeError as e:
            found.add(line, None, f"not valid JSON at column {e.colno}: {e.msg}; write one whole object a line")
        except (ValueError, RecursionError) as e:
            found.add(line, None, f"not usable JSON: {e}")
        else:
            if isinstance(value, dict):
                yield line, value
            else:
                found.add(line, None, f'{JSON_NAMES[type(value)]}, not an object; write {{"prompt": ...}}')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} is there twice; keep one")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value; write null or a number")


def _parquet(path: Path, found: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        df = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as e:
        raise QueryFileError(f"{path} is not a Parquet file that can be read: {e}") from e
    for line, value in enumerate(df.iter_rows(named=True), start=1):
        args = value.get("verifier_args")
        if isinstance(args, str):
            try:
                value["verifier_args"] = json.loads(args, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as e:
                found.add(line, "verifier_args", f"not valid JSON: {e}")
                value["verifier_args"] = None
        elif args is not None:
            value["verifier_args"] = _without_nulls(args)
        yield line, value


def _without_nulls(value: Any) -> Any:
    """A struct column gives every row every row's fields, null where the row has none."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _row(value: dict[str, Any], line: int, found: Problems) -> QueryRow | None:
    before = found._count
    value = {k: v for k, v in value.items() if v is not None}
    for key, content in list(value.items()):
        if key not in KEYS:
            found.add(line, repr(key), f"unknown key; {nearest(key, KEYS)}")
        elif not isinstance(content, KEYS[key]) or isinstance(content, bool):
            kind = KEYS[key]
            wanted = JSON_NAMES[kind] if isinstance(kind, type) else "text or a number"
            hint = f'; write "{content}"' if key == "answer" and isinstance(content, int | float) else ""
            found.add(line, key, f"must be {wanted}, is {JSON_NAMES.get(type(content), type(content).__name__)}{hint}")
            return None
        elif isinstance(content, str) and (bad := _bad_text(content)):
            found.add(line, key, bad)
    messages = _messages(value, line, found)
    if (split := value.get("split")) not in (None, "train", "eval"):
        found.add(line, "split", f"unknown split {split!r}; use 'train' or 'eval', or leave it out")
    args = value.get("verifier_args")
    if "verifier" not in value and args is not None:
        found.add(line, "verifier_args", "there is no verifier to take them; add 'verifier'")
    if found._count > before:
        return None
    if "verifier" in value:
        try:
            check_spec(value.get("answer"), value["verifier"], args or {}, messages[-1]["content"])
            args = json.dumps(args or {}, sort_keys=True, ensure_ascii=False, allow_nan=False)
            args.encode()
        except SpecError as e:
            found.add(line, "verifier", str(e))
            return None
        except (TypeError, ValueError) as e:
            found.add(line, "verifier_args", f"cannot be written as JSON: {e}")
            return None
    return QueryRow(line, query_id(messages), messages, value.get("answer"), value.get("verifier"), args, split)


def _messages(value: dict[str, Any], line: int, found: Problems) -> list[dict[str, Any]]:
    """The canonical messages of a row; problems are added to `found`, and then the result is not to be used."""
    if "messages" not in value:
        if "prompt" not in value:
            found.add(line, "prompt", "missing; give 'prompt', or 'messages'")
        elif not value["prompt"].strip():
            found.add(line, "prompt", "empty; write the query")
        system = [{"role": "system", "content": value["system"]}] if value.get("system", "").strip() else []
        return [*system, {"role": "user", "content": value.get("prompt", "")}]
    for other in ("prompt", "system"):
        if other in value:
            found.add(line, other, f"given beside 'messages'; keep one of them ({other!r} can be a message)")
    messages = value["messages"]
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]", line, found)
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "user":
        found.add(line, "messages", "must end with a message of role 'user'")
    return [{"role": m.get("role"), "content": m.get("content")} for m in messages if isinstance(m, dict)]


def _check_message(message: Any, where: str, line: int, found: Problems) -> None:
    if not isinstance(message, dict):
        found.add(line, where, 'must be an object {"role": ..., "content": ...}')
        return
    for key in (k for k, v in message.items() if v is not None and k not in ("role", "content")):
        found.add(line, f"{where}.{key!r}", f"unknown key; {nearest(key, ['role', 'content'])}")
    if (role := message.get("role")) not in ROLES:
        found.add(line, f"{where}.role", f"unknown role {role!r}; use {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, str):
        found.add(line, f"{where}.content", f"must be text, is {JSON_NAMES.get(type(content), type(content).__name__)}")
    elif not content.strip():
        found.add(line, f"{where}.content", "empty; write the message or leave it out")
    elif bad := _bad_text(content):
        found.add(line, f"{where}.content", bad)


def _bad_text(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return f"holds half a surrogate pair at character {e.start + 1}, which is no text; escape both halves or none"
    if "\0" in text:
        return f"holds a null character (U+0000) at character {text.index(chr(0)) + 1}; remove it"
    return None
