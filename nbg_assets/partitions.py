"""The partitions: one slice per query file, stored in the Dagster instance and never removed.

A slice whose query file was deleted keeps its partition, so that its rows and runs can still be looked at. Staleness
and training follow the query files, not the partitions.
"""

from __future__ import annotations

import dagster as dg

from nbg_core.config.load import load_profile
from nbg_core.config.profile import Profile
from nbg_core.config.slices import slice_names

SLICE = "slice"
"""Name of the partitions definition, under which Dagster stores the partition keys."""

slice_partitions = dg.DynamicPartitionsDefinition(name=SLICE)


def sync_partitions(instance: dg.DagsterInstance, profile: Profile | None = None) -> list[str]:
    """Add a partition for every query file that has none. Returns the names of those added."""
    present = set(instance.get_dynamic_partitions(SLICE))
    added = [name for name in slice_names(profile or load_profile()) if name not in present]
    if added:
        instance.add_dynamic_partitions(SLICE, added)
    return added
