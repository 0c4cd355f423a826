"""The `nbg` command: run what is stale, see what is there, ask the lake."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import sys
from pathlib import Path
from typing import Annotated, Literal

import duckdb
import polars as pl
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nbg_core import accuracy, checks, config, lineage
from nbg_core.config import Profile, load_profile
from nbg_core.lake import Lake
from nbg_core.processes import is_defect, redact, sentence

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
# No markup, no emoji codes: names, errors and answers are shown as they are, whatever brackets and colons they hold.
console, errors = (
    Console(highlight=False, markup=False, emoji=False, stderr=e, width=None if sys.stdout.isatty() else 160)
    for e in (False, True)
)
Slices = Annotated[list[str] | None, typer.Option("--slice", "-s", help="Only this slice (repeatable).")]


def main() -> None:
    """Entry point: errors that a user can mend end in one line on stderr and exit code 1."""
    try:
        app()
    except Exception as e:
        if is_defect(e):
            raise
        errors.print(Text.assemble(("error: ", "red"), sentence(e)), soft_wrap=True)
        sys.exit(1)


def _open() -> tuple[Profile, Lake]:
    profile = load_profile()
    return profile, Lake.of(profile)


@app.command()
def run(slice: Slices = None) -> None:
    """Materialise everything that is missing or stale, through Dagster; say what was already done."""
    from nbg_assets.driver import dagster_instance, materialise_stale

    profile, _ = _open()
    _say(f"profile {profile.name}, slices: {', '.join(slice or lineage.slices(profile))}")
    try:
        with dagster_instance(profile) as instance:
            results = materialise_stale(instance, profile, slices=slice, on_line=_say)
    except KeyboardInterrupt:
        errors.print("stopped; what was committed is kept, and the next `nbg run` goes on from there")
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


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)


@app.command()
def demo() -> None:
    """The whole pipeline on every slice, then the accuracy table and what to try next."""
    run()
    report()
    console.print("\nNext:")
    console.print("  make dev                                            the Dagster UI at http://127.0.0.1:3000")
    console.print('  .venv/bin/nbg sql "SELECT reason, count(*) AS n FROM rejections GROUP BY ALL ORDER BY n DESC"')
    console.print("  cp my_queries.jsonl data/queries/ && .venv/bin/nbg run     a slice of your own")


@app.command()
def report(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint id, or its beginning; else the newest of this profile.")
    ] = None,
) -> None:
    """Held-out accuracy per slice: before, after, teacher, with 95% intervals."""
    profile, lake = _open()
    if checkpoint is not None:
        checkpoint = accuracy.checkpoint_row(lake, checkpoint)["checkpoint_id"]
    checkpoint, summary, made_by = accuracy.latest_summary(lake, checkpoint, profile=profile.name)
    table = Table("slice", "queries", "before", "after", "teacher", "after - before")
    for r in summary.iter_rows(named=True):
        cell = {k: f"{r[k]:.1%} [{r[k + '_low']:.1%}, {r[k + '_high']:.1%}]" for k in ("before", "after", "teacher")}
        gain = (
            f"{100 * r['difference']:+.1f} [{100 * r['difference_low']:+.1f}, {100 * r['difference_high']:+.1f}] points"
        )
        table.add_row(r["slice"], str(r["n"]), *cell.values(), gain, style="bold" if r["slice"] == "overall" else None)
    console.print(f"\ncheckpoint {checkpoint}" + (f", of profile {made_by}" if made_by != profile.name else ""))
    console.print(table)


@app.command()
def status(slice: Slices = None) -> None:
    """What is fresh, stale or missing, and why."""
    profile, lake = _open()
    table = Table("asset", "slice", "state", "why")
    for s in lineage.status(lake, profile, slice):
        table.add_row(s.asset, s.slice or "", s.state, s.why)
    console.print(table)


@app.command()
def sql(
    query: str,
    format: Annotated[Literal["table", "json", "csv"], typer.Option(help="For people, or for programs.")] = "table",
    snapshot: Annotated[int | None, typer.Option(min=0, help="Read the lake as it was at this snapshot.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows shown in a table (json and csv give all).")] = 40,
) -> None:
    """Ask the lake a read-only question; safe while a run is going on."""
    _, lake = _open()
    try:
        _only_questions(query)
        try:
            df = lake.sql(query, snapshot=snapshot)
        except pl.exceptions.ComputeError as e:
            if "interval" not in str(e):
                raise
            df = lake.sql(_intervals_as_text(lake, query, snapshot), snapshot=snapshot)
    except duckdb.Error as e:
        raise LookupError(f"{e}") from e
    if format == "csv":
        nested = [c for c, t in df.schema.items() if t.is_nested()]
        texts = {c: [None if v is None else _json(v) for v in df[c].to_list()] for c in nested}
        sys.stdout.write(df.with_columns(pl.Series(c, v, pl.String) for c, v in texts.items()).write_csv())
    elif format == "json":
        sys.stdout.write(_json(df.to_dicts()) + "\n")
    else:
        table = Table(*df.columns)
        for row in df.head(rows).iter_rows():
            table.add_row(*(_short(v) for v in row))
        console.print(table)
        console.print(f"{df.height} rows" + (f", first {rows} shown" if df.height > rows else ""))


_FILE_DELETERS = re.compile(r"cleanup_old_files|delete_orphaned_files|expire_snapshots", re.IGNORECASE)


def _only_questions(query: str) -> None:
    """Raises ValueError for what is not one question: the lake is read-only to DuckDB, files are not."""
    explain = re.compile(r"\s*EXPLAIN\b(\s+ANALYZE\b)?", re.IGNORECASE)
    if found := _FILE_DELETERS.search(query):  # they delete files, and fail to note it afterwards
        raise ValueError(f"`nbg sql` is read-only and does not take {found[0]}; `nbg compact` looks after files")
    statements = duckdb.extract_statements(query)
    if len(statements) != 1:
        raise ValueError(f"`nbg sql` takes one question, not {len(statements)}")
    for statement in statements:
        parts = [statement]
        if statement.type == duckdb.StatementType.EXPLAIN:  # EXPLAIN ANALYZE runs what it explains
            parts = duckdb.extract_statements(explain.sub("", statement.query, count=1))
        if other := [part.type.name for part in parts if part.type != duckdb.StatementType.SELECT]:
            raise ValueError(
                "`nbg sql` is read-only and takes questions (SELECT, FROM, DESCRIBE, SHOW, SUMMARIZE, EXPLAIN), not "
                f"{other[0]} statements; use --format csv for a file, FROM name(...) for CALL, and "
                "FROM (PIVOT ... ON column IN (...)) for PIVOT"
            )


def _intervals_as_text(lake: Lake, query: str, snapshot: int | None) -> str:
    """polars has no intervals."""
    (statement,) = duckdb.extract_statements(query)
    query = statement.query.strip().rstrip(";")
    columns = lake.sql(f"DESCRIBE {query}", snapshot=snapshot)
    names = columns.filter(pl.col("column_type").str.contains("INTERVAL"))["column_name"]
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    return f"SELECT * REPLACE ({', '.join(f'{q}::VARCHAR AS {q}' for q in quoted)}) FROM (\n{query}\n)"


def _json(value: object) -> str:
    """Valid JSON: it has no infinities and no NaN, so these become null."""

    def plain(v: object) -> object:
        if isinstance(v, dict):
            return {k: plain(x) for k, x in v.items()}
        if isinstance(v, list):
            return [plain(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(plain(value), default=str, ensure_ascii=False, allow_nan=False)


def _short(value: object, width: int = 60) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value).replace("\n", "\\n")
    return text if len(text) <= width else text[: width - 1] + "…"


@app.command()
def tables() -> None:
    """Every table and column of the lake, with what it means and how many rows there are."""
    from nbg_core.schemas import TABLES, sql_type

    _, lake = _open()
    for name, schema in TABLES.items():
        n = lake.sql(f"SELECT count(*) AS n FROM {name}")["n"][0]
        table = Table("column", "type", "meaning", title=f"{name}: {n} rows", title_justify="left")
        for column, spec in schema.columns().items():
            table.add_row(column, sql_type(spec.dtype), spec.description or "")
        console.print(table)


@app.command("compact")
def compact_files() -> None:
    """Merge the lake's small files into larger ones; what any snapshot shows stays the same."""
    from nbg_core.compact import KEEP, compact

    _, lake = _open()
    for name, before, after in compact(lake).iter_rows():
        console.print(f"{name}: {before} files are now {after}")
    console.print(f"replaced files are deleted by the next `nbg compact` after {KEEP}")


@app.command()
def trace(id: Annotated[str, typer.Argument(help="Checkpoint, pair, sample or query id, or its beginning.")]) -> None:
    """Follow an id up and down: checkpoint, pairs, samples, queries."""
    shown = {
        "queries": ("query_id", "slice", "split", "prompt", "answer"),
        "samples": ("sample_id", "query_id", "source", "finish_reason", "text"),
        "pairs": ("pair_id", "slice", "chosen_id", "rejected_id", "margin"),
        "checkpoints": ("checkpoint_id", "parent_model_id", "n_pairs", "n_steps", "input_snapshot"),
    }
    _, lake = _open()
    for name, df in lineage.trace(lake, id).items():
        table = Table(*shown[name], title=f"{name}: {df.height}", title_justify="left")
        for row in df.select(shown[name]).head(8).iter_rows():
            table.add_row(*(_short(v, 34) for v in row))
        console.print(table)


@app.command()
def promote(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint id, or its beginning; sft is the profile's student.")],
    reason: Annotated[str, typer.Option(help="Recorded with the promotion.")] = "promoted by hand",
    force: Annotated[bool, typer.Option(help="Also if its evaluation says no.")] = False,
) -> None:
    """Make a checkpoint the policy that the next round samples from."""
    profile, lake = _open()
    if not force and checkpoint != lineage.SFT and (why := accuracy.objection(lake, checkpoint)):
        raise ValueError(f"{checkpoint} is not promoted: {why}; see `nbg report {checkpoint}`, or use --force")
    accuracy.promote(lake, profile, checkpoint, reason)
    console.print(f"policy is now {lineage.current_policy(lake, profile).model_id}; `nbg status` shows what to refresh")


@app.command("profile")
def show_profile(
    which: Annotated[str | None, typer.Argument(help="Name or path.")] = None,
    reference: Annotated[bool, typer.Option(help="Print every setting with default and meaning instead.")] = False,
) -> None:
    """Validate a profile and print every setting of it."""
    import yaml

    if reference:
        print(config.reference(), end="")
        return

    profile = load_profile(which)
    for problem in checks.cannot_run(profile):
        errors.print(f"note: {problem}", soft_wrap=True)
    console.print(redact(yaml.safe_dump(json.loads(profile.model_dump_json()), sort_keys=False)), soft_wrap=True)


@app.command()
def dev(port: int = 3000, host: str = "127.0.0.1") -> None:
    """The Dagster UI and daemon (webserver, schedules, sensors) on this project."""
    from nbg_assets.driver import dagster_instance
    from nbg_assets.partitions import sync_partitions

    profile, _ = _open()
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except (OSError, OverflowError) as e:
            raise ValueError(
                f"port {port} of {host} cannot be had ({e}); is `nbg dev` running? Or give another --port"
            ) from e
    with dagster_instance(profile) as instance:
        sync_partitions(instance)
    if (which := os.environ.get("NBG_PROFILE", "")).endswith((".yaml", ".yml")):
        os.environ["NBG_PROFILE"] = str(Path(which).resolve())  # relative to where the user is, not to the project
    os.chdir(config.PROJECT_ROOT)
    command = [str(Path(sys.executable).parent / "dagster"), "dev", "-w", "workspace.yaml", "-h", host, "-p", str(port)]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
