"""The current policy: the model that samples, that training starts from, and that is the reference of the DPO term."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbg_core.base.ids import model_id
from nbg_core.base.names import file_name_problem
from nbg_core.config.profile import Profile
from nbg_core.lake.lake import Lake

SFT = "sft"
"""In the place of a path in `promotions`: the profile's student."""


@dataclass(frozen=True)
class Policy:
    model_id: str
    path: Path
    promoted: bool
    """False for the profile's student."""


def checkpoint_folder(profile: Profile, name: str) -> Path:
    """The folder of a checkpoint, from column `path` of `checkpoints` and `promotions`.

    Raises ValueError for what is not the name of a folder: the lake may have been written by others, and no row of it
    may lead out of `paths.checkpoints`."""
    folder = profile.resolve(profile.paths.checkpoints)
    if problem := file_name_problem(name):
        raise ValueError(f"{name!r} cannot be a checkpoint's folder in {folder}: {problem}; promote another checkpoint")
    return folder / name


def current_policy(lake: Lake, profile: Profile) -> Policy:
    """The checkpoint promoted last; the profile's student before the first promotion, or when SFT was promoted.

    Raises FileNotFoundError when its folder is gone, ValueError when it holds another model or its name is none."""
    rows = lake.sql("SELECT model_id, path FROM promotions ORDER BY snapshot_id DESC, rowid DESC LIMIT 1")
    if rows.is_empty() or rows["path"].item() == SFT:
        path = profile.resolve(profile.models.student)
        return Policy(model_id(path), path, False)
    row = rows.row(0, named=True)
    path = checkpoint_folder(profile, row["path"])
    if model_id(path) != row["model_id"]:
        raise ValueError(
            f"the promoted model at {path} is not {row['model_id']} any more; restore it or promote another"
        )
    return Policy(row["model_id"], path, True)
