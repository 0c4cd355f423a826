"""The two sensors: `new_query_files` adds a partition for a new query file and starts a run of it;
`train_when_slices_fresh` starts training once all slices are fresh, while the refresh schedule is on."""

from __future__ import annotations

import time

import dagster as dg

from nbg_assets.jobs import refresh_slice, train
from nbg_assets.partitions import SLICE, slice_partitions
from nbg_assets.resources import NbgResource
from nbg_assets.schedules import is_on, training_is_running
from nbg_assets.stale import stale_slices, stale_student, training_key
from nbg_core.config.slices import find_slices, query_file
from nbg_core.lineage.staleness import status

SETTLE_SECONDS = 3
"""A file that changed less than this long ago may not be complete yet. It waits for the next tick."""


@dg.sensor(
    job=refresh_slice,
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Makes a partition of every new file in the queries folder and starts its run.",
)
def new_query_files(context: dg.SensorEvaluationContext, nbg: NbgResource):
    profile = nbg.load()
    good, refused = find_slices(profile)
    for reason in refused.values():
        context.log.warning(reason)
    present = set(context.instance.get_dynamic_partitions(SLICE))
    files = {name: query_file(profile, name).stat().st_mtime for name in good if name not in present}
    settled = [name for name, changed in files.items() if time.time() - changed >= SETTLE_SECONDS]
    if not settled:
        return dg.SkipReason("; ".join(["no new query file that is complete", *refused.values()]))
    context.log.info(f"new slices: {', '.join(settled)}")
    return dg.SensorResult(
        run_requests=[dg.RunRequest(run_key=f"{name}:{files[name]}", partition_key=name) for name in settled],
        dynamic_partitions_requests=[slice_partitions.build_add_request(settled)],
    )


@dg.sensor(
    job=train,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="While the schedule refresh_all_slices is on: trains and evaluates when every slice is fresh and the "
    "checkpoint or its evaluation is not; once per state of the slices, settings and policy.",
)
def train_when_slices_fresh(context: dg.SensorEvaluationContext, nbg: NbgResource):
    if not is_on(context.instance):
        return dg.SkipReason("the schedule refresh_all_slices is off")
    profile, lake = nbg.load(), nbg.lake()
    states = status(lake, profile)
    waiting = stale_slices(states)
    if waiting:
        return dg.SkipReason(f"slices are not fresh: {', '.join(waiting)}")
    if not any(s.slice_name for s in states):
        return dg.SkipReason(f"no query file in {profile.resolve(profile.paths.queries)}")
    due = stale_student(states)
    if not due:
        return dg.SkipReason("the checkpoint and its evaluation are fresh")
    if training_is_running(context.instance):
        return dg.SkipReason("training is running")
    return dg.RunRequest(run_key=training_key(lake, profile, due), asset_selection=[dg.AssetKey(a) for a in due])
