"""Everything Dagster loads. One asset per file in `defs/`; what all of them share is applied once, here.

Steps run in the run's own process, one after the other: they only wait for a worker (`pipes.py`). Runs of several
slices go side by side; the pool `model` keeps those that run a model apart (dagster.yaml).
"""

from __future__ import annotations

import os

import dagster as dg

from nbg_assets import defs as asset_files
from nbg_assets.jobs import refresh_slice, train
from nbg_assets.metadata import TABLE_OF, column_schema
from nbg_assets.resources import NbgResource
from nbg_assets.schedules import refresh_all_slices
from nbg_assets.sensors import new_query_files, train_when_slices_fresh
from nbg_core.config import load_profile
from nbg_core.lake import CODE_VERSION

OWNER = "team:post-training"


def shared(spec: dg.AssetSpec) -> dg.AssetSpec:
    """What every asset has: owner, code version, stage tag, and its lake table with columns."""
    table = TABLE_OF[spec.key.path[-1]]
    return spec.replace_attributes(code_version=CODE_VERSION).merge_attributes(
        owners=[OWNER],
        tags={"stage": spec.group_name},
        metadata={"dagster/table_name": f"lake.{table}", "dagster/column_schema": column_schema(table)},
    )


def build(which: str | None = None) -> dg.Definitions:
    """The definitions for a profile (name or path; NBG_PROFILE, else embedded).

    Raises ProfileError for a profile that cannot be used."""
    which = which or os.environ.get("NBG_PROFILE") or "embedded"
    profile = load_profile(which)
    return dg.Definitions(
        assets=dg.map_asset_specs(shared, dg.load_assets_from_package_module(asset_files)),
        jobs=[refresh_slice, train],
        schedules=[refresh_all_slices(profile)],
        sensors=[new_query_files, train_when_slices_fresh],
        resources={"nbg": NbgResource(profile=which)},
        executor=dg.in_process_executor,
    )


defs = build()
