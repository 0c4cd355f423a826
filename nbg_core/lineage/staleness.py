"""Which partitions are fresh, stale or missing, and why.

A partition is *fresh* when its newest complete materialisation was made with the current settings from the current
content of its upstream partitions. Content is compared by data version (a digest of ids), so an upstream partition that
was materialised again without a change makes nothing stale.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nbg_core.assets import ASSETS, partition_name, settings_of, upstream_partitions
from nbg_core.config import identity
from nbg_core.config.profile import Profile
from nbg_core.config.slices import query_file, slice_names
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import latest_materialisations
from nbg_core.lineage.policy import current_policy

Partition = tuple[str, str | None]
"""Asset and slice name."""


@dataclass(frozen=True)
class Status:
    """The state of a partition."""

    asset: str
    slice_name: str | None
    state: Literal["fresh", "stale", "missing"]
    why: str
    """The reason for the state; empty when fresh."""


def status(lake: Lake, profile: Profile, which: Sequence[str] | None = None) -> list[Status]:
    """The state of every partition, in an order in which they can be materialised.

    A partition whose upstream is stale is stale, too. `which` limits the slices that are returned. Assets without
    partitions are always returned, and compared with all slices. A query file that has become invalid shows as stale
    `queries`, and materialising it raises the error. Raises FileNotFoundError for a slice without a query file,
    ValueError for a name that cannot be that of a slice."""
    for name in which or ():
        query_file(profile, name)
    policy = current_policy(lake, profile)
    newest = latest_materialisations(lake)
    names = slice_names(profile)
    result: dict[Partition, Status] = {}
    for asset in ASSETS:
        for slice_name in names if asset.partitioned else [None]:
            inputs = upstream_partitions(asset.name, slice_name, names)
            settings = settings_of(asset.name, profile, policy.model_id, slice_name)
            state, why = _state(newest.get((asset.name, slice_name)), inputs, newest, result, settings)
            result[asset.name, slice_name] = Status(asset.name, slice_name, state, why)
    return [s for s in result.values() if which is None or s.slice_name is None or s.slice_name in which]


def _state(
    row: dict | None,
    inputs: list[Partition],
    newest: dict[Partition, dict],
    statuses: dict[Partition, Status],
    settings: dict,
) -> tuple[Literal["fresh", "stale", "missing"], str]:
    """State of a partition and the reason for it, given its newest materialisation `row` and the partitions `inputs`
    that it reads. `newest` and `statuses` have the materialisation and the state of each input."""
    if row is None:
        return "missing", "never materialised"
    if row["code_version"] != identity.CODE_VERSION:
        return "stale", "made by another version of the code"
    if row["settings_id"] != identity.settings_id(settings):
        return "stale", f"changed: {', '.join(_changed(json.loads(row['settings']), settings))}"
    read = {(i["asset"], i["slice"]): i["data_version"] for i in json.loads(row["inputs"])}
    for key in inputs:
        name = partition_name(*key)
        if key not in read:
            return "stale", f"{name} is new"
        if statuses[key].state != "fresh":
            return "stale", f"{name} is {statuses[key].state}"
        if newest[key]["data_version"] != read[key]:
            return "stale", f"{name} changed"
    gone = [f"{asset}[{slice_name}]" for asset, slice_name in read if (asset, slice_name) not in inputs]
    return ("stale", f"{gone[0]} is gone") if gone else ("fresh", "")


def _changed(before: dict, now: dict) -> list[str]:
    """Names of the settings that differ, those of a section as `section.name`."""
    before, now = (_flat(json.loads(json.dumps(settings, default=str))) for settings in (before, now))
    both = before.keys() & now.keys()
    return sorted(name for name in before.keys() | now.keys() if name not in both or before[name] != now[name])


def _flat(settings: dict, prefix: str = "") -> dict:
    flat: dict[str, object] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return flat
