"""Checks of names that a person wrote: names of table entries, slices and runs.

An unknown name is an error that lists the known ones. A name that becomes part of a path is checked before any path is
made of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error about an unknown name: the most similar known name, or all known names if none is similar."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"


def find(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`. Raises ValueError, with the known names, for an unknown one; `what` is the kind of name."""
    if name not in table:
        raise unknown(what, name, table)
    return table[name]


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among the `known` ones, for the last case of a `match`, say."""
    return ValueError(f"unknown {what} {name!r}; known: {', '.join(known) or 'none'}")


@dataclass(frozen=True)
class OneOf:
    """Pydantic metadata of a field whose value must be a key of `table`: `Annotated[str, OneOf("scorer", SCORERS)]`.

    The table is read when a value is checked, so a profile can use a key that was added after the class was made."""

    what: str
    table: Mapping[str, object]

    def __get_pydantic_core_schema__(self, source, handler):
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        find(self.table, name, self.what)
        return name


def file_name_problem(name: str) -> str | None:
    """Why `name` cannot be a file name, or None if it can: it must be printable and must not lead out of its folder."""
    if not name.strip():
        return "it is empty"
    if name.startswith("."):
        return "it starts with '.', as hidden files do"
    if "/" in name or "\\" in name:
        return "it holds a path separator"
    if not name.isprintable() or name != name.strip():
        return "it holds control characters (such as tab or newline), or spaces at an end"
    if len(name.encode()) > 200:
        return "it is longer than 200 bytes"
    return None


def check_run_id(run_id: str) -> None:
    """Raise ValueError for a run id that cannot be the name of a folder of logs."""
    if problem := file_name_problem(run_id):
        raise ValueError(f"{run_id!r} cannot be a run id: {problem}; use letters, digits and hyphens")
