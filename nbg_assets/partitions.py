"""The partitions: one `slice` per query file, kept in the Dagster instance and never removed by us.

A slice whose file is gone keeps its partition (its rows and runs are still there to look at); staleness and training
follow the files, not the partitions.
"""

from __future__ import annotations

import dagster as dg

from nbg_core import lineage
from nbg_core.config import Profile, load_profile

slices = dg.DynamicPartitionsDefinition(name="slice")


def sync_partitions(instance: dg.DagsterInstance, profile: Profile | None = None) -> list[str]:
    """Make a partition of every query file that has none; return those added."""
    present = set(instance.get_dynamic_partitions(slices.name))
    added = [name for name in lineage.slices(profile or load_profile()) if name not in present]
    if added:
        instance.add_dynamic_partitions(slices.name, added)
    return added
