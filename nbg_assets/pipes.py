"""One stage as one Dagster step: a worker process whose log streams into the run, and one final report.

The step holds no model and no rows. Terminating the run ends the worker and everything it started; a failed worker
fails the step with its own sentence. A partition whose upstream fails a blocking check is refused before it starts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import dagster as dg

from nbg_assets import metadata
from nbg_assets.plots import Plot
from nbg_assets.resources import NbgResource
from nbg_core import lineage
from nbg_core.checks import CHECKS, Subject, broken_upstream
from nbg_core.processes import WorkerFailed, run_worker
from nbg_core.vllm.environment import missing_environment

progress = logging.getLogger("nbg.progress")
"""Every line a worker prints, also outside Dagster's own log: the command line listens here."""
progress.setLevel(logging.INFO)
progress.propagate = False

BURST_LINES = 200
"""Lines that go into the event log at once; a chattier worker gets one a second, and all of them in its log file."""


def check_specs(asset: str) -> list[dg.AssetCheckSpec]:
    """Dagster's declaration of the asset's checks."""
    return [
        dg.AssetCheckSpec(c.name, asset=asset, description=c.description, blocking=c.blocking) for c in CHECKS[asset]
    ]


def materialise(
    context: dg.AssetExecutionContext,
    nbg: NbgResource,
    plots: Mapping[str, Callable[[metadata.Made], Plot | None]] | None = None,
) -> dg.MaterializeResult:
    """Run the stage of this step's asset and partition, then its checks; describe what was made.

    Raises dagster.Failure with the worker's sentence when it failed."""
    asset = context.asset_key.path[-1]
    slice = None if asset in lineage.UNPARTITIONED else context.partition_key
    profile = nbg.load()
    context.log.info(f"profile {profile.name}")
    if problem := missing_environment(profile):
        raise dg.Failure(problem, allow_retries=False)
    lake = nbg.lake()
    if problem := broken_upstream(lake, profile, asset, slice):
        raise dg.Failure(f"not started: {problem}", allow_retries=False)
    start, before = time.monotonic(), lineage.latest(lake, asset, slice)
    try:
        report = run_worker(asset, slice, context.run_id, profile=nbg.profile, on_line=_say(context))
    except WorkerFailed as e:
        raise dg.Failure(
            e.error,
            metadata={"log": dg.MetadataValue.path(str(e.log_path)), "end of log": "\n".join(e.tail)},
            allow_retries=False,
        ) from None
    version = report["data_version"]
    unchanged = report["new_rows"] == 0 and before is not None and before["data_version"] == version
    made = metadata.Made(asset, slice, profile, lake, report | {"unchanged": unchanged}, time.monotonic() - start)
    return dg.MaterializeResult(
        metadata=metadata.describe(made, plots or {}),
        data_version=dg.DataVersion(version),
        check_results=_check(made),
    )


def _check(made: metadata.Made) -> list[dg.AssetCheckResult]:
    subject = Subject(made.lake, made.profile, made.slice)
    results = []
    for check in CHECKS[made.asset]:
        violations = check.violations(subject)
        found = {"violations": violations.height, "partition": made.slice or ""}
        why = f" ({violations['why'][0]})" if violations.height and "why" in violations.columns else ""
        if violations.height:
            found["first violations"] = dg.MetadataValue.md(metadata.table(violations))
        results.append(
            dg.AssetCheckResult(
                passed=violations.is_empty(),
                check_name=check.name,
                asset_key=made.asset,
                severity=dg.AssetCheckSeverity.ERROR if check.blocking else dg.AssetCheckSeverity.WARN,
                description=check.description if violations.is_empty() else f"violated: {check.description}{why}",
                metadata=found,
            )
        )
    return results


def _say(context: dg.AssetExecutionContext) -> Callable[[str], None]:
    """A sink for worker lines that a chatty library cannot use to flood the event log."""
    allowance, last = float(BURST_LINES), time.monotonic()

    def say(line: str) -> None:
        nonlocal allowance, last
        progress.info(line)
        now = time.monotonic()
        allowance, last = min(BURST_LINES, allowance + now - last), now
        if allowance >= 1 and line.strip():
            allowance -= 1
            context.log.info(line)

    return say
