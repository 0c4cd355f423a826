"""Reads and validates query files.

A file is `<slice>.jsonl` (one object per line, UTF-8, blank lines skipped) or `<slice>.parquet`. Keys of a row:

| key | value |
|---|---|
| prompt | text of the user message |
| system | text of a system message before it (optional) |
| messages | instead of these two: a list of {"role": ..., "content": text}, roles as in ROLES, the last one user |
| answer | reference answer, text (optional) |
| verifier | how responses are checked: a name in `scorers.verifiers.VERIFIERS` (optional) |
| verifier_args | the verifier's arguments, an object (optional) |
| split | "train" or "eval"; without it the query's id decides |
| id | an id of your own, which must be unique in the file and is otherwise not used (optional) |

A key whose value is null counts as absent. In Parquet, `verifier_args` is JSON text or a struct, whose null fields
count as absent too. All problems of a file are reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from nbg_core.base.ids import query_id
from nbg_core.base.names import find, nearest
from nbg_core.scorers.verifiers import SpecError, check_spec

SHOWN = 20
"""Maximum number of problems that an error describes; the others are only counted."""

KEYS: dict[str, type | tuple[type, ...]] = {
    "prompt": str, "system": str, "messages": list, "answer": str, "verifier": str, "verifier_args": dict,
    "split": str, "id": (str, int),
}  # fmt: skip
"""Key of a row -> the types that its value may have."""
ROLES = ("system", "user", "assistant")
"""Roles that a message may have."""
JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number",
              type(None): "null"}  # fmt: skip
"""Python type -> what JSON calls a value of it."""


class QueryFileError(ValueError):
    """A query file cannot be used. The message names the file, and line, field and remedy of every problem."""


@dataclass(frozen=True)
class QueryRow:
    """A valid row of a query file."""

    line: int
    """1-based line, in Parquet the 1-based row."""
    query_id: str
    messages: list[dict[str, str]]
    """Each with `role` and `content`; the last one is the user's."""
    answer: str | None
    verifier: str | None
    verifier_args: str | None
    """Canonical JSON of an object; None without a verifier."""
    split: str | None
    """'train' or 'eval' if the row says so."""


def read_rows(path: Path) -> list[QueryRow]:
    """The rows of a query file, in order. Raises QueryFileError naming every problem."""
    problems = Problems(path)
    rows: list[QueryRow] = []
    line_of_id: dict[str | int, int] = {}
    for line, value in find(READERS, path.suffix, "suffix of a query file")(path, problems):
        row = _row(value, line, problems)
        if (row_id := value.get("id")) is not None and not isinstance(row_id, list | dict):
            if row_id in line_of_id:
                other = f"{problems.unit} {line_of_id[row_id]}"
                problems.add(line, "id", f"{row_id!r} is also the id of {other}; ids must be unique")
            line_of_id.setdefault(row_id, line)
        if row:
            rows.append(row)
    problems.raise_if_any()
    if not rows:
        raise QueryFileError(
            f"{path} is empty; write one query a line, "
            'e.g. {"prompt": "Add: 1 + 2", "answer": "3", "verifier": "exact"}'
        )
    return rows


class Problems:
    """The problems of a query file. The first SHOWN are kept, all are counted."""

    def __init__(self, path: Path):
        self.path, self.unit = path, "row" if path.suffix == ".parquet" else "line"
        self.count = 0
        self._shown: list[str] = []

    def add(self, line: int, field: str | None, problem: str) -> None:
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(f"{self.unit} {line}" + (f", {field}" if field else "") + f": {problem}")

    def raise_if_any(self) -> None:
        if self.count:
            shown = f", the first {SHOWN} are" if self.count > SHOWN else ""
            noun = "problem" if self.count == 1 else "problems"
            raise QueryFileError(f"{self.path}: {self.count} {noun}{shown}:\n  " + "\n  ".join(self._shown))


def _jsonl(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for line, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except UnicodeDecodeError as e:
            problems.add(line, None, f"not valid UTF-8 at byte {e.start + 1} of the line; save the file as UTF-8")
        except json.JSONDecodeError as e:
            problems.add(line, None, f"not valid JSON at column {e.colno}: {e.msg}; write one whole object a line")
        except (ValueError, RecursionError) as e:
            problems.add(line, None, f"not usable JSON: {e}")
        else:
            if isinstance(value, dict):
                yield line, value
            else:
                problems.add(line, None, f'{JSON_NAMES[type(value)]}, not an object; write {{"prompt": ...}}')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these (key, value) pairs. Raises ValueError for a key that appears twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice; keep one")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value; write null or a number")


def _parquet(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
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
                problems.add(line, "verifier_args", f"not valid JSON: {e}")
                value["verifier_args"] = None
        elif args is not None:
            value["verifier_args"] = _without_nulls(args)
        yield line, value


READERS: dict[str, Callable[[Path, Problems], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
"""Suffix of a file (`config.slices.SUFFIXES`) -> function that yields (line, row)."""


def _without_nulls(value: Any) -> Any:
    """`value` without null fields: in a struct column each row has the fields of all rows, most of them null."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _row(value: dict[str, Any], line: int, problems: Problems) -> QueryRow | None:
    """The row of one object of a file; None if there is a problem, which is added to `problems`."""
    count_before = problems.count
    value = {k: v for k, v in value.items() if v is not None}
    for key, content in list(value.items()):
        if key not in KEYS:
            problems.add(line, repr(key), f"unknown key; {nearest(key, KEYS)}")
        elif not isinstance(content, KEYS[key]) or isinstance(content, bool):
            kind = KEYS[key]
            wanted = JSON_NAMES[kind] if isinstance(kind, type) else "text or a number"
            hint = f'; write "{content}"' if key == "answer" and isinstance(content, int | float) else ""
            problems.add(line, key, f"must be {wanted}, is {_json_name(content)}{hint}")
            return None
        elif isinstance(content, str) and (bad := _bad_text(content)):
            problems.add(line, key, bad)
    messages = _messages(value, line, problems)
    if (split := value.get("split")) not in (None, "train", "eval"):
        problems.add(line, "split", f"unknown split {split!r}; use 'train' or 'eval', or leave it out")
    args = value.get("verifier_args")
    if "verifier" not in value and args is not None:
        problems.add(line, "verifier_args", "there is no verifier to take them; add 'verifier'")
    if problems.count > count_before:
        return None
    if "verifier" in value:
        try:
            check_spec(value.get("answer"), value["verifier"], args or {}, messages[-1]["content"])
            args = json.dumps(args or {}, sort_keys=True, ensure_ascii=False, allow_nan=False)
            args.encode()
        except SpecError as e:
            problems.add(line, "verifier", str(e))
            return None
        except (TypeError, ValueError) as e:
            problems.add(line, "verifier_args", f"cannot be written as JSON: {e}")
            return None
    return QueryRow(line, query_id(messages), messages, value.get("answer"), value.get("verifier"), args, split)


def _messages(value: dict[str, Any], line: int, problems: Problems) -> list[dict[str, Any]]:
    """The messages of a row, each with role and content only. If this adds to `problems`, ignore the result."""
    if "messages" not in value:
        if "prompt" not in value:
            problems.add(line, "prompt", "missing; give 'prompt', or 'messages'")
        elif not value["prompt"].strip():
            problems.add(line, "prompt", "empty; write the query")
        system = [{"role": "system", "content": value["system"]}] if value.get("system", "").strip() else []
        return [*system, {"role": "user", "content": value.get("prompt", "")}]
    for other in ("prompt", "system"):
        if other in value:
            problems.add(line, other, f"given beside 'messages'; keep one of them ({other!r} can be a message)")
    messages = value["messages"]
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]", line, problems)
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "user":
        problems.add(line, "messages", "must end with a message of role 'user'")
    return [{"role": m.get("role"), "content": m.get("content")} for m in messages if isinstance(m, dict)]


def _check_message(message: Any, where: str, line: int, problems: Problems) -> None:
    if not isinstance(message, dict):
        problems.add(line, where, 'must be an object {"role": ..., "content": ...}')
        return
    for key in (k for k, v in message.items() if v is not None and k not in ("role", "content")):
        problems.add(line, f"{where}.{key!r}", f"unknown key; {nearest(key, ['role', 'content'])}")
    if (role := message.get("role")) not in ROLES:
        problems.add(line, f"{where}.role", f"unknown role {role!r}; use {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, str):
        problems.add(line, f"{where}.content", f"must be text, is {_json_name(content)}")
    elif not content.strip():
        problems.add(line, f"{where}.content", "empty; write the message or leave it out")
    elif bad := _bad_text(content):
        problems.add(line, f"{where}.content", bad)


def _json_name(value: Any) -> str:
    """What an error calls a value. A type that JSON does not have (a date in Parquet, say) goes by its Python name."""
    return JSON_NAMES.get(type(value), type(value).__name__)


def _bad_text(text: str) -> str | None:
    """Why a text cannot be stored, or None if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return f"contains an unpaired surrogate at character {e.start + 1}, which is not text; remove it"
    if "\0" in text:
        return f"contains a null character (U+0000) at character {text.index(chr(0)) + 1}; remove it"
    return None
