"""The Dagster assets, made from the registry (`nbg_core.assets`).

The step of an asset loads no model and reads no large tables. It starts a worker process that runs the asset's stage,
writes the worker's output into the run's log, waits for the worker's report and then runs the asset's checks.
Terminating the run ends the worker and all processes below it. When the worker fails, the step fails with the worker's
error. A step whose upstream partition fails a blocking check does not start.
"""

# No `from __future__ import annotations`: Dagster reads the annotations of a step at run time and needs classes.
import logging
import time
from collections.abc import Callable

import dagster as dg

from nbg_assets import metadata, plots
from nbg_assets.partitions import slice_partitions
from nbg_assets.resources import NbgResource
from nbg_core.assets import ASSETS, Asset, get
from nbg_core.base.names import find
from nbg_core.checks.checks import broken_upstream, checks_of
from nbg_core.checks.violations import Subject
from nbg_core.config.identity import CODE_VERSION
from nbg_core.lake.queries import latest_materialisation
from nbg_core.runtime.run_worker import WorkerFailed, run_worker
from nbg_core.vllm.environment import missing_environment

OWNER = "team:post-training"
POOL = "model"
"""Dagster pool of the steps that load a model. Its size is in dagster.yaml."""

worker_log = logging.getLogger("nbg.progress")
"""Gets every line that a worker prints, whatever goes into Dagster's event log. `nbg run` shows these lines."""
worker_log.setLevel(logging.INFO)
worker_log.propagate = False

BURST_LINES = 200
"""Lines of a worker that may enter the event log at once. After them it takes one line a second, and drops the rest;
the worker's log file has all lines."""


def make_assets() -> list[dg.AssetsDefinition]:
    """The Dagster assets, one for each entry of ASSETS."""
    return [_make(asset) for asset in ASSETS]


def _make(asset: Asset) -> dg.AssetsDefinition:
    for plot in asset.plots:
        find(plots.PLOTS, plot, "plot")

    @dg.asset(
        name=asset.name,
        description=asset.description,
        deps=list(asset.upstream),
        group_name=asset.group,
        kinds=set(asset.kinds),
        partitions_def=slice_partitions if asset.partitioned else None,
        pool=POOL if asset.loads_model else None,
        check_specs=[
            dg.AssetCheckSpec(c.name, asset=asset.name, description=c.description, blocking=c.blocking)
            for c in checks_of(asset.name)
        ],
        owners=[OWNER],
        tags={"stage": asset.group},
        code_version=CODE_VERSION,
        metadata={
            "dagster/table_name": f"lake.{asset.tables[0]}",
            "dagster/column_schema": metadata.column_schema(asset.tables[0]),
        },
    )
    def step(context: dg.AssetExecutionContext, nbg: NbgResource) -> dg.MaterializeResult:
        return materialise(context, nbg)

    return step


def materialise(context: dg.AssetExecutionContext, nbg: NbgResource) -> dg.MaterializeResult:
    """Run the stage of this step's asset and partition, then its checks. The result carries their outcome and the
    metadata of the materialisation.

    Raises dagster.Failure with the worker's error when the worker failed, and when the step cannot start."""
    asset = get(context.asset_key.path[-1])
    slice_name = context.partition_key if asset.partitioned else None
    profile = nbg.load()
    context.log.info(f"profile {profile.name}")
    if problem := missing_environment(profile):
        raise dg.Failure(problem, allow_retries=False)
    lake = nbg.lake()
    if problem := broken_upstream(lake, profile, asset.name, slice_name):
        raise dg.Failure(f"not started: {problem}", allow_retries=False)
    start, before = time.monotonic(), latest_materialisation(lake, asset.name, slice_name)
    try:
        report = run_worker(asset.name, slice_name, context.run_id, profile=nbg.profile, on_line=_log_lines(context))
    except WorkerFailed as e:
        raise dg.Failure(
            e.error,
            metadata={"log": dg.MetadataValue.path(str(e.log_path)), "end of log": "\n".join(e.tail)},
            allow_retries=False,
        ) from None
    version = report["data_version"]
    unchanged = report["new_rows"] == 0 and before is not None and before["data_version"] == version
    made = metadata.Made(asset, slice_name, profile, lake, report | {"unchanged": unchanged}, time.monotonic() - start)
    return dg.MaterializeResult(
        metadata=metadata.describe(made), data_version=dg.DataVersion(version), check_results=_check(made)
    )


def _check(made: metadata.Made) -> list[dg.AssetCheckResult]:
    subject = Subject(made.lake, made.profile, made.asset.name, made.slice_name)
    results = []
    for check in checks_of(made.asset.name):
        violations = check.violations(subject)
        about: dict[str, dg.MetadataValue | int | str] = {
            "violations": violations.height, "partition": made.slice_name or "",
        }  # fmt: skip
        reason = f" ({violations['why'][0]})" if violations.height and "why" in violations.columns else ""
        if violations.height:
            about["first violations"] = dg.MetadataValue.md(metadata.table(violations))
        results.append(
            dg.AssetCheckResult(
                passed=violations.is_empty(),
                check_name=check.name,
                asset_key=made.asset.name,
                severity=dg.AssetCheckSeverity.ERROR if check.blocking else dg.AssetCheckSeverity.WARN,
                description=check.description if violations.is_empty() else f"violated: {check.description}{reason}",
                metadata=about,
            )
        )
    return results


def _log_lines(context: dg.AssetExecutionContext) -> Callable[[str], None]:
    """A function that logs one line of a worker. It limits the lines per second in the event log (BURST_LINES), which a
    library that prints a lot would otherwise flood."""
    allowance, last = float(BURST_LINES), time.monotonic()

    def log(line: str) -> None:
        nonlocal allowance, last
        worker_log.info(line)
        now = time.monotonic()
        allowance, last = min(BURST_LINES, allowance + now - last), now
        if allowance >= 1 and line.strip():
            allowance -= 1
            context.log.info(line)

    return log
