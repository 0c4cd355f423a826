"""The definitions that Dagster loads.

The steps of a run are executed one after the other in the run's own process: they only wait for a worker (`assets.py`).
Runs of several slices are executed at the same time; the pool `model` limits how many of their steps load a model
(dagster.yaml).
"""

from __future__ import annotations

import os

import dagster as dg

from nbg_assets.assets import make_assets
from nbg_assets.jobs import refresh_slice, train
from nbg_assets.resources import NbgResource
from nbg_assets.schedules import refresh_all_slices
from nbg_assets.sensors import new_query_files, train_when_slices_fresh
from nbg_core.config.load import load_profile


def build(which: str | None = None) -> dg.Definitions:
    """The definitions for the profile `which`, a name or path; by default NBG_PROFILE, else `embedded`.

    Raises ProfileError for a profile that cannot be used."""
    which = which or os.environ.get("NBG_PROFILE") or "embedded"
    profile = load_profile(which)
    return dg.Definitions(
        assets=make_assets(),
        jobs=[refresh_slice, train],
        schedules=[refresh_all_slices(profile)],
        sensors=[new_query_files, train_when_slices_fresh],
        resources={"nbg": NbgResource(profile=which)},
        executor=dg.in_process_executor,
    )


defs = build()
