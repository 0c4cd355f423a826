"""Commands that run the pipeline: `run`, `demo`, `dev`."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from nbg_assets.cli.app import Slices, app, console, errors, open_lake, say
from nbg_assets.cli.show import report
from nbg_core.base.errors import redact
from nbg_core.config.profile import PROJECT_ROOT
from nbg_core.config.slices import slice_names


@app.command()
def run(slice_name: Slices = None) -> None:
    """Materialise what is missing or stale: each slice, then training and evaluation. Exits with 1 if anything
    failed."""
    from nbg_assets.driver import dagster_instance, materialise_stale

    profile, _ = open_lake()
    say(f"profile {profile.name}, slices: {', '.join(slice_name or slice_names(profile))}")
    try:
        with dagster_instance(profile) as instance:
            results = materialise_stale(instance, profile, slices=slice_name, on_line=say)
    except KeyboardInterrupt:
        errors.print("stopped; what was committed is kept, and the next `nbg run` continues from there")
        raise typer.Exit(130) from None
    failed = [r for r in results if not r.success]
    for r in failed:
        console.print(
            Text.assemble(("failed: ", "red"), f"{r.name}: {redact(r.message).removeprefix(f'{r.name}: ')}"),
            soft_wrap=True,
        )
    made = sum(r.ran and r.success for r in results)
    count = f"{made} materialised, {len(results) - made - len(failed)} already up to date, {len(failed)} failed"
    if checks_failed := sum(r.checks_failed for r in results):
        count += f"; checks that did not pass (above): {checks_failed}"
    console.print(count)
    if failed:
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Run the whole pipeline on every slice, then show the accuracy table and what to try next."""
    run()
    report()
    console.print("\nNext:")
    console.print("  make dev                                            the Dagster UI at http://127.0.0.1:3000")
    console.print('  .venv/bin/nbg sql "SELECT reason, count(*) AS n FROM rejections GROUP BY ALL ORDER BY n DESC"')
    console.print("  cp my_queries.jsonl data/queries/ && .venv/bin/nbg run     a slice of your own")


@app.command()
def dev(
    port: Annotated[int, typer.Option(help="Port of the UI.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on; the UI has no log-in.")] = "127.0.0.1",
) -> None:
    """Start the Dagster UI and daemon (webserver, schedules, sensors) on this project."""
    from nbg_assets.driver import dagster_instance
    from nbg_assets.partitions import sync_partitions

    profile, _ = open_lake()
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except (OSError, OverflowError) as e:
            raise ValueError(
                f"port {port} on {host} is not free ({e}); is `nbg dev` already running? Or give another --port"
            ) from e
    with dagster_instance(profile) as instance:
        sync_partitions(instance)
    if (which := os.environ.get("NBG_PROFILE", "")).endswith((".yaml", ".yml")):
        os.environ["NBG_PROFILE"] = str(Path(which).resolve())  # before the change of directory
    os.chdir(PROJECT_ROOT)
    command = [str(Path(sys.executable).parent / "dagster"), "dev", "-w", "workspace.yaml", "-h", host, "-p", str(port)]
    os.execvp(command[0], command)
