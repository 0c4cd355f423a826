"""Commands that show what exists: `status`, `report`, `tables`, `trace`, `profile`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from nbg_assets.cli.app import Slices, app, console, errors, open_lake, short
from nbg_core.assets import ASSETS
from nbg_core.base.errors import redact
from nbg_core.checks import checks
from nbg_core.config import load
from nbg_core.config.load import load_profile
from nbg_core.evaluation.accuracy import latest_summary
from nbg_core.lake.queries import checkpoint_row
from nbg_core.lineage import staleness
from nbg_core.lineage import trace as tracing


@app.command()
def report(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint id, or its beginning; default: the newest of this profile.")
    ] = None,
) -> None:
    """Show held-out accuracy per slice: before training, after it, and the teacher's, with 95% intervals."""
    profile, lake = open_lake()
    if checkpoint is not None:
        checkpoint = checkpoint_row(lake, checkpoint)["checkpoint_id"]
    checkpoint, summary, made_by = latest_summary(lake, checkpoint, profile=profile.name)
    table = Table("slice", "queries", "before", "after", "teacher", "after - before")
    for r in summary.iter_rows(named=True):
        cell = {k: f"{r[k]:.1%} [{r[k + '_low']:.1%}, {r[k + '_high']:.1%}]" for k in ("before", "after", "teacher")}
        gain = (
            f"{100 * r['difference']:+.1f} [{100 * r['difference_low']:+.1f}, {100 * r['difference_high']:+.1f}] points"
        )
        table.add_row(r["slice"], str(r["n"]), *cell.values(), gain, style="bold" if r["is_overall"] else None)
    console.print(f"\ncheckpoint {checkpoint}" + (f", of profile {made_by}" if made_by != profile.name else ""))
    console.print(table)


@app.command()
def status(slice_name: Slices = None) -> None:
    """Show which partitions are fresh, stale or missing, and why."""
    profile, lake = open_lake()
    table = Table("asset", "slice", "state", "why")
    for s in staleness.status(lake, profile, slice_name):
        table.add_row(s.asset, s.slice_name or "", s.state, s.why)
    console.print(table)


@app.command()
def tables() -> None:
    """Show every table of the lake: its rows, and the type and meaning of its columns."""
    from nbg_core.lake.tables import TABLES, sql_type

    _, lake = open_lake()
    for name, schema in TABLES.items():
        n = lake.sql(f"SELECT count(*) AS n FROM {name}")["n"][0]
        writers = ", ".join(asset.name for asset in ASSETS if name in asset.tables) or "every commit"
        if name == "promotions":
            writers += " and `nbg promote`"
        title = f"{name}: {n} rows, written by {writers}"
        table = Table("column", "type", "meaning", title=title, title_justify="left")
        for column, spec in schema.columns().items():
            table.add_row(column, sql_type(spec.dtype), spec.description or "")
        console.print(table)


@app.command()
def trace(
    start: Annotated[
        str, typer.Argument(metavar="ID", help="Checkpoint, training, pair, sample or query id, or its beginning.")
    ],
) -> None:
    """Show what an id was made from and what was made from it: queries, samples, pairs, checkpoints."""
    shown = {
        "queries": ("query_id", "slice", "split", "prompt", "answer"),
        "samples": ("sample_id", "query_id", "source", "finish_reason", "text"),
        "pairs": ("pair_id", "slice", "chosen_id", "rejected_id", "margin"),
        "checkpoints": ("checkpoint_id", "parent_model_id", "n_pairs", "n_steps", "input_snapshot"),
    }
    _, lake = open_lake()
    for name, df in tracing.trace(lake, start).items():
        table = Table(
            *shown[name], title=f"{name}: {df.height}{', first 8' if df.height > 8 else ''}", title_justify="left"
        )
        for row in df.select(shown[name]).head(8).iter_rows():
            table.add_row(*(short(v, 34) for v in row))
        console.print(table)


@app.command("profile")
def show_profile(
    which: Annotated[
        str | None,
        typer.Argument(help="Name in profiles/, or path of a .yaml file; default: NBG_PROFILE, else embedded."),
    ] = None,
    reference: Annotated[bool, typer.Option(help="Print default and meaning of every setting instead.")] = False,
) -> None:
    """Validate a profile and print all its settings."""
    import yaml

    if reference:
        print(load.reference(), end="")
        return

    profile = load_profile(which)
    for problem in checks.cannot_run(profile):
        errors.print(f"note: {problem}", soft_wrap=True)
    console.print(redact(yaml.safe_dump(json.loads(profile.model_dump_json()), sort_keys=False)), soft_wrap=True)
