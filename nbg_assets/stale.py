"""What is to be materialised, decided by the lake's lineage. Dagster's own staleness does not cover all cases of
partitioned assets."""

from __future__ import annotations

from collections.abc import Sequence

from nbg_core.assets import UNPARTITIONED, settings_of
from nbg_core.base.ids import digest
from nbg_core.config import identity
from nbg_core.config.profile import Profile
from nbg_core.config.slices import slice_names
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import latest_materialisations
from nbg_core.lineage.policy import current_policy
from nbg_core.lineage.staleness import Status


def stale_slices(states: Sequence[Status]) -> dict[str, list[str]]:
    """Slice name -> its missing and stale assets, in an order in which they can be materialised; no fresh slices."""
    result: dict[str, list[str]] = {}
    for s in states:
        if s.slice_name is not None and s.state != "fresh":
            result.setdefault(s.slice_name, []).append(s.asset)
    return result


def stale_student(states: Sequence[Status]) -> list[str]:
    """The missing and stale ones among the assets without partitions: training and evaluation."""
    return [s.asset for s in states if s.slice_name is None and s.state != "fresh"]


def training_key(lake: Lake, profile: Profile, due: Sequence[str]) -> str:
    """A run key for training and evaluation: Dagster starts one run per key.

    It changes with the settings, the policy and the content of the slices, and with the assets that are `due`. So an
    evaluation that failed after its training is started once more."""
    policy = current_policy(lake, profile)
    settings = [settings_of(a, profile, policy.model_id, None) for a in UNPARTITIONED]
    slices = set(slice_names(profile))
    versions = [
        [asset, slice_name, row["data_version"]]
        for (asset, slice_name), row in latest_materialisations(lake).items()
        if slice_name in slices
    ]
    return digest("training", list(due), [identity.settings_id(s) for s in settings], sorted(versions))
