"""The current policy: the model that samples responses, that training starts from, and that is the DPO reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbg_core.base.ids import model_id
from nbg_core.config.profile import Profile
from nbg_core.lake.lake import Lake

SFT = "sft"
"""The value of `promotions.path` that stands for the profile's student."""


@dataclass(frozen=True)
class Policy:
    model_id: str
    path: Path
    promoted: bool
    """Whether it is a promoted checkpoint; False for the profile's student."""


def current_policy(lake: Lake, profile: Profile) -> Policy:
    """The checkpoint promoted last; the profile's student before the first promotion and after promoting SFT.

    Raises FileNotFoundError when the model's folder is missing, ValueError when it holds another model."""
    rows = lake.sql("SELECT model_id, path FROM promotions ORDER BY snapshot_id DESC, rowid DESC LIMIT 1")
    if rows.is_empty() or rows["path"].item() == SFT:
        path = profile.resolve(profile.models.student)
        return Policy(model_id(path), path, False)
    row = rows.row(0, named=True)
    path = profile.resolve(profile.paths.checkpoints) / row["path"]
    if model_id(path) != row["model_id"]:
        raise ValueError(
            f"the promoted model at {path} is not {row['model_id']} any more; restore it or promote another"
        )
    return Policy(row["model_id"], path, True)
