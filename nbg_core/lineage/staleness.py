"""Which partitions are fresh, stale or missing, and why.

A partition is *fresh* when it has a complete materialisation made with today's settings from its upstreams' present
content. Content is compared by data version (a digest of ids), so an upstream that ran again without changing
anything makes nothing stale.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Whether a partition is up to date; `why` is empty when fresh."""

    asset: str
    slice_name: str | None
    state: str  # 'fresh', 'stale' or 'missing'
    why: str


def status(lake: Lake, profile: Profile, which: Sequence[str] | None = None) -> list[Status]:
    """The state of every partition, in an order in which they can be materialised.

    `which` limits the slices that are shown. What reads all slices is held to all of them, and a partition below a
    stale one is stale too. A query file that is broken today shows as stale `queries`; the error itself comes when it
    is materialised. Raises FileNotFoundError for a slice without a file, ValueError for a name that cannot be one."""
    for name in which or ():
        query_file(profile, name)
    policy = current_policy(lake, profile)
    done = latest_materialisations(lake)
    names = slice_names(profile)
    result: dict[Partition, Status] = {}
    for asset in ASSETS:
        for slice_name in names if asset.partitioned else [None]:
            inputs = upstream_partitions(asset.name, slice_name, names)
            wanted = identity.settings_id(settings_of(asset.name, profile, policy.model_id, slice_name))
            state, why = _state(done.get((asset.name, slice_name)), inputs, done, result, wanted)
            result[asset.name, slice_name] = Status(asset.name, slice_name, state, why)
    return [s for s in result.values() if which is None or s.slice_name is None or s.slice_name in which]


def _state(
    row: dict | None, inputs: list[Partition], done: dict[Partition, dict], result: dict[Partition, Status], wanted: str
) -> tuple[str, str]:
    if row is None:
        return "missing", "never materialised"
    if row["code_version"] != identity.CODE_VERSION:
        return "stale", "made by another version of the code"
    if row["settings_id"] != wanted:
        return "stale", "settings, policy or file changed"
    read = {(i["asset"], i["slice"]): i["data_version"] for i in json.loads(row["inputs"])}
    for key in inputs:
        name = partition_name(*key)
        if key not in read:
            return "stale", f"{name} is new"
        if result[key].state != "fresh":
            return "stale", f"{name} is {result[key].state}"
        if done[key]["data_version"] != read[key]:
            return "stale", f"{name} changed"
    gone = [f"{asset}[{slice_name}]" for asset, slice_name in read if (asset, slice_name) not in inputs]
    return ("stale", f"{gone[0]} is gone") if gone else ("fresh", "")
