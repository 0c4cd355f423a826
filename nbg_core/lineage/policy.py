"""The current policy: the model that samples responses, that training starts from, and that is the DPO reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbg_core.base.ids import model_id
from nbg_core.base.names import file_name_problem
from nbg_core.config.profile import Profile
from nbg_core.lake.lake import Lake

SFT = "sft"
"""Value of `promotions.path` that means the profile's student."""


@dataclass(frozen=True)
class Policy:
    model_id: str
    path: Path
    promoted: bool
    """Whether it is a promoted checkpoint; False for the profile's student."""


def checkpoint_folder(profile: Profile, name: str) -> Path:
    """The folder of a checkpoint, from column `path` of `checkpoints` and `promotions`.

    Raises ValueError for a name that is not a plain folder name: rows may have been written by others, and none may
    lead out of `paths.checkpoints`."""
    folder = profile.resolve(profile.paths.checkpoints)
    if problem := file_name_problem(name):
        raise ValueError(f"{name!r} cannot be a checkpoint's folder in {folder}: {problem}; promote another checkpoint")
    return folder / name


def current_policy(lake: Lake, profile: Profile) -> Policy:
    """The checkpoint promoted last; the profile's student before the first promotion and after promoting SFT.

    Raises FileNotFoundError when the model's folder is missing, ValueError when it holds another model or its name
    cannot be that of a folder."""
    rows = lake.sql("SELECT model_id, path FROM promotions ORDER BY snapshot_id DESC, rowid DESC LIMIT 1")
    if rows.is_empty() or rows["path"].item() == SFT:
        path = profile.resolve(profile.models.student)
        return Policy(model_id(path), path, False)
    row = rows.row(0, named=True)
    return Policy(row["model_id"], check_checkpoint(profile, row["path"], row["model_id"]), True)


def check_checkpoint(profile: Profile, name: str, checkpoint: str) -> Path:
    """The folder of a checkpoint, which holds its weights.

    Raises FileNotFoundError when it is missing, ValueError when it holds another model."""
    path = checkpoint_folder(profile, name)
    remedy = "restore the folder, or promote another checkpoint (`nbg promote sft` goes back to the student)"
    try:
        found = model_id(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"the checkpoint {checkpoint} is not at {path}; {remedy}") from None
    if found != checkpoint:
        raise ValueError(f"the checkpoint at {path} is no longer {checkpoint}; {remedy}")
    return path
