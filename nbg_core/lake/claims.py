"""Which catalogs keep their files in a data path: every lake notes it there when it is opened (`.catalogs`).

Two catalogs in one data path cannot tell each other's files from those of a killed writer (see `uncommitted`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from nbg_core.base.errors import without_passwords
from nbg_core.base.files import write_json
from nbg_core.base.ids import digest


def claim(catalog: str, data_path: str) -> None:
    """Note in the data path that this catalog keeps its files there. Does nothing in an object store, or where this
    user may not write."""
    path = claim_path(catalog, data_path)
    if path is None or path.exists():
        return
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"catalog": without_passwords(catalog), "data_path": data_path})
    except OSError:  # a lake that may only be read
        pass


def claim_path(catalog: str, data_path: str) -> Path | None:
    """The file of a claim; None in an object store."""
    if "://" in data_path:
        return None
    return Path(data_path) / ".catalogs" / f"{digest('claim', without_passwords(catalog), data_path)}.json"


def other_claims(mine: Path, data_path: str) -> Iterator[str]:
    """Catalogs that keep their files here, besides ours. The claim of a lake that was moved or copied together with its
    files, or whose SQLite catalog is gone, is void."""
    for path in sorted(mine.parent.glob("*.json")):
        if path == mine:
            continue
        other = json.loads(path.read_text())
        kind, _, where = other["catalog"].partition(":")
        if other["data_path"] == data_path and (kind != "sqlite" or Path(where).exists()):
            yield other["catalog"]
