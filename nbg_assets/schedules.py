"""The refresh schedule: one run per stale slice, with its stale assets only.

It switches the whole loop on and off: while it is on, the sensor `train_when_slices_fresh` starts training as soon as
these runs have made every slice fresh.
"""

from __future__ import annotations

import dagster as dg
from dagster import DagsterRunStatus, RunsFilter
from dagster._core.definitions.run_request import InstigatorType  # `is_on` needs it; there is no public way

from nbg_assets.jobs import refresh_slice
from nbg_assets.partitions import SLICE
from nbg_assets.resources import NbgResource
from nbg_assets.stale import stale_slices
from nbg_core.assets import UNPARTITIONED
from nbg_core.config.profile import Profile
from nbg_core.lineage.staleness import status

NAME = "refresh_all_slices"

UNFINISHED = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.SUSPENDED,
    DagsterRunStatus.CANCELING,
]
"""Statuses of a run that has not ended."""


def refresh_all_slices(profile: Profile) -> dg.ScheduleDefinition:
    """The schedule with the profile's cron string and time zone. It is off until it is switched on in the UI."""

    @dg.schedule(
        name=NAME,
        job=refresh_slice,
        cron_schedule=profile.refresh.cron,
        execution_timezone=profile.refresh.timezone,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="One run per stale slice, of its stale assets only. While it is on, training follows once every "
        "slice is fresh (sensor train_when_slices_fresh).",
    )
    def schedule(context: dg.ScheduleEvaluationContext, nbg: NbgResource):
        present = set(context.instance.get_dynamic_partitions(SLICE))
        stale = stale_slices(status(nbg.lake(), nbg.load()))
        busy = busy_slices(context.instance)
        due = {
            slice_name: assets
            for slice_name, assets in stale.items()
            if slice_name in present and slice_name not in busy
        }
        if not due:
            running = f"; already running: {', '.join(sorted(busy & set(stale)))}" if busy & set(stale) else ""
            return dg.SkipReason(f"no stale slice can start{running}" if stale else "no slice is stale")
        return [
            dg.RunRequest(
                run_key=f"{context.scheduled_execution_time.isoformat()}:{slice_name}",
                partition_key=slice_name,
                asset_selection=[dg.AssetKey(a) for a in assets],
            )
            for slice_name, assets in due.items()
        ]

    return schedule


def is_on(instance: dg.DagsterInstance) -> bool:
    """Whether the schedule is switched on in this instance."""
    states = instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
    return any(s.instigator_name == NAME and s.is_running for s in states)


def busy_slices(instance: dg.DagsterInstance) -> set[str]:
    """Slices with a run that has not ended."""
    runs = instance.get_runs(RunsFilter(statuses=UNFINISHED))
    return {key for r in runs if (key := r.tags.get("dagster/partition"))}


def training_is_running(instance: dg.DagsterInstance) -> bool:
    """Whether a run of training or evaluation has not ended."""
    wanted = {dg.AssetKey(a) for a in UNPARTITIONED}
    runs = instance.get_runs(RunsFilter(statuses=UNFINISHED))
    return any(r.job_name == "train" or wanted & set(r.asset_selection or ()) for r in runs)
