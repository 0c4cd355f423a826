"""What there is to do, from the lake's own lineage: Dagster's staleness does not cover partitions in every case."""

from __future__ import annotations

from collections.abc import Sequence

from nbg_core import lineage
from nbg_core.config import Profile
from nbg_core.ids import digest
from nbg_core.lake import Lake

SLICED = tuple(a for a in lineage.UPSTREAM if a not in lineage.UNPARTITIONED)


def stale_slices(states: Sequence[lineage.Status]) -> dict[str, list[str]]:
    """Missing and stale assets of each slice that has any, in an order in which they can be materialised."""
    result: dict[str, list[str]] = {}
    for s in states:
        if s.slice is not None and s.state != "fresh":
            result.setdefault(s.slice, []).append(s.asset)
    return result


def stale_student(states: Sequence[lineage.Status]) -> list[str]:
    """Of training and evaluation, what is missing or stale."""
    return [s.asset for s in states if s.slice is None and s.state != "fresh"]


def training_key(lake: Lake, profile: Profile, due: Sequence[str]) -> str:
    """Changes when a training run would give something else: settings, policy, or a slice's content; or when other
    assets are `due`, so that an evaluation that failed after its training is asked for once more."""
    policy = lineage.current_policy(lake, profile)
    settings = [lineage.settings_of(a, profile, policy, None) for a in lineage.UNPARTITIONED]
    versions = lake.sql(
        "SELECT asset, slice, data_version FROM lineage.commits WHERE status = 'complete' "
        "AND slice IN (SELECT unnest(?)) QUALIFY row_number() OVER (PARTITION BY asset, slice ORDER BY snapshot_id "
        "DESC) = 1 ORDER BY asset, slice",
        [lineage.slices(profile)],
    )
    return digest(
        "training", list(due), [lineage.settings_id(s) for s in settings], [list(r) for r in versions.iter_rows()]
    )
