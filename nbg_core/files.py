"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def write_json(path: Path, data: dict) -> None:
    """Write whole or not at all; what JSON does not know is written as text."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, default=str))
    temporary.rename(path)


def link_folder(source: Path, target: Path) -> None:
    """Make `target`, whole or not at all, with the files of `source`: hard links, or copies across file systems."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, temporary, copy_function=_link)
    temporary.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
