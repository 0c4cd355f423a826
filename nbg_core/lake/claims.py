"""Which catalogs keep their files in a data path. Every lake notes it there when it is opened, in `.catalogs`.

Without that, a catalog could not tell the files of another one from those of a killed writer (see `orphaned_files`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from nbg_core.base.errors import without_passwords
from nbg_core.base.files import write_json
from nbg_core.base.ids import digest


def claim(catalog: str, data_path: str) -> None:
    """Note in the data path that this catalog keeps its files there. Does nothing in an object store, or if this user
    may not write there."""
    path = claim_path(catalog, data_path)
    if path is None or path.exists():
        return
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"catalog": without_passwords(catalog), "data_path": data_path})
    except OSError:  # this user may only read the lake
        pass


def claim_path(catalog: str, data_path: str) -> Path | None:
    """The file of a claim; None in an object store."""
    if "://" in data_path:
        return None
    return Path(data_path) / ".catalogs" / f"{digest('claim', without_passwords(catalog), data_path)}.json"


def other_claims(mine: Path, data_path: str) -> Iterator[str]:
    """The other catalogs that keep their files here; `mine` is this catalog's claim. A claim is void if its lake was
    moved or copied together with its files, or if its SQLite catalog is gone."""
    for path in sorted(mine.parent.glob("*.json")):
        if path == mine:
            continue
        other = json.loads(path.read_text())
        kind, _, where = other["catalog"].partition(":")
        if other["data_path"] == data_path and (kind != "sqlite" or Path(where).exists()):
            yield other["catalog"]
