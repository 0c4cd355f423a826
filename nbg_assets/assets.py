"""The Dagster assets, made from the registry (`nbg_core.assets`): one step per asset, which runs its stage.

A step holds no model and no rows. It starts a worker process whose log streams into the run, waits for its one final
report, then runs the asset's checks. Terminating the run ends the worker and everything it started; a failed worker
fails the step with its own sentence. A partition whose upstream fails a blocking check is refused before it starts.
"""

# No `from __future__ import annotations`: Dagster looks at the annotations of a step itself, and needs classes.
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
"""Steps that load a model wait for one another (dagster.yaml)."""

progress = logging.getLogger("nbg.progress")
"""Every line a worker prints, also outside Dagster's own log: the command line listens here."""
progress.setLevel(logging.INFO)
progress.propagate = False

BURST_LINES = 200
"""Lines that go into the event log at once; a chattier worker gets one a second, and all of them in its log file."""


def make_assets() -> list[dg.AssetsDefinition]:
    """A Dagster asset per asset of the registry."""
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
    """Run the stage of this step's asset and partition, then its checks; describe what was made.

    Raises dagster.Failure with the worker's sentence when it failed."""
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
        found: dict[str, dg.MetadataValue | int | str] = {
            "violations": violations.height, "partition": made.slice_name or "",
        }  # fmt: skip
        why = f" ({violations['why'][0]})" if violations.height and "why" in violations.columns else ""
        if violations.height:
            found["first violations"] = dg.MetadataValue.md(metadata.table(violations))
        results.append(
            dg.AssetCheckResult(
                passed=violations.is_empty(),
                check_name=check.name,
                asset_key=made.asset.name,
                severity=dg.AssetCheckSeverity.ERROR if check.blocking else dg.AssetCheckSeverity.WARN,
                description=check.description if violations.is_empty() else f"violated: {check.description}{why}",
                metadata=found,
            )
        )
    return results


def _log_lines(context: dg.AssetExecutionContext) -> Callable[[str], None]:
    """A sink for worker lines that a chatty library cannot use to flood the event log."""
    allowance, last = float(BURST_LINES), time.monotonic()

    def log(line: str) -> None:
        nonlocal allowance, last
        progress.info(line)
        now = time.monotonic()
        allowance, last = min(BURST_LINES, allowance + now - last), now
        if allowance >= 1 and line.strip():
            allowance -= 1
            context.log.info(line)

    return log
