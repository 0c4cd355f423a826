"""Slices: the query files of a profile."""

from __future__ import annotations

from pathlib import Path

from nbg_core.base.names import file_name_problem
from nbg_core.config.profile import Profile

SUFFIXES = (".jsonl", ".parquet")
"""Suffixes of query files, in the order in which they are looked for."""


def slice_names(profile: Profile) -> list[str]:
    """The slices: names of the query files that can be slices, sorted."""
    return find_slices(profile)[0]


def find_slices(profile: Profile) -> tuple[list[str], dict[str, str]]:
    """The names of query files that can be slices, sorted; and for each other name the reason why it cannot."""
    folder = profile.resolve(profile.paths.queries)
    good, refused = [], {}
    for name in sorted({p.stem for p in folder.glob("*") if p.suffix in SUFFIXES and p.is_file()}):
        try:
            check_slice_name(name)
            good.append(name)
        except ValueError as e:
            refused[name] = str(e)
    return good, refused


def check_slice_name(name: str) -> None:
    """Raise ValueError, with the reason, for a name that cannot be both a partition key and a file name."""
    problem = file_name_problem(name)
    if problem is None and "..." in name:
        problem = "it holds '...', which separates the ends of a partition range"
    if problem:
        raise ValueError(f"{name!r} cannot be a slice: {problem}; rename the query file, e.g. to 'addition.jsonl'")


def query_file(profile: Profile, slice_name: str) -> Path:
    """The file of a slice. Raises ValueError for a name that cannot be one, FileNotFoundError naming the folder and the
    slices that exist."""
    check_slice_name(slice_name)
    folder = profile.resolve(profile.paths.queries)
    for suffix in SUFFIXES:
        if (path := folder / f"{slice_name}{suffix}").is_file():
            return path
    known = ", ".join(slice_names(profile)) or "none"
    files = " or ".join(slice_name + suffix for suffix in SUFFIXES)
    raise FileNotFoundError(f"no {files} in {folder}; slices there: {known}")
