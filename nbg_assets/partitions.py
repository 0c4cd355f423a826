"""The partitions: one `slice` per query file, kept in the Dagster instance and never removed by us.

A slice whose file is gone keeps its partition (its rows and runs are still there to look at); staleness and training
follow the files, not the partitions.
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
    """Make a partition of every query file that has none; return those added."""
    present = set(instance.get_dynamic_partitions(SLICE))
    added = [name for name in slice_names(profile or load_profile()) if name not in present]
    if added:
        instance.add_dynamic_partitions(SLICE, added)
    return added
