"""`nbg sql`: a read-only query of the lake, printed for people or for programs."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Annotated, Literal

import duckdb
import polars as pl
import typer
from rich.table import Table

from nbg_assets.cli.app import app, console, open_lake, short
from nbg_core.lake.lake import Lake


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One SQL statement that only reads.")],
    output: Annotated[
        Literal["table", "json", "csv"],
        typer.Option("--format", help="table is for people, json and csv for programs."),
    ] = "table",
    snapshot: Annotated[int | None, typer.Option(min=0, help="Read the lake as it was at this snapshot.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows shown in a table (json and csv give all).")] = 40,
) -> None:
    """Run a read-only SQL query on the lake. It is safe while a run is in progress."""
    _, lake = open_lake()
    try:
        _check_read_only(query)
        try:
            df = lake.sql(query, snapshot=snapshot)
        except pl.exceptions.ComputeError as e:
            if "interval" not in str(e):
                raise
            df = lake.sql(_intervals_as_text(lake, query, snapshot), snapshot=snapshot)
    except duckdb.Error as e:
        raise LookupError(f"{e}") from e
    if output == "csv":
        nested = [c for c, t in df.schema.items() if t.is_nested()]
        texts = {c: [None if v is None else _json(v) for v in df[c].to_list()] for c in nested}
        sys.stdout.write(df.with_columns(pl.Series(c, v, pl.String) for c, v in texts.items()).write_csv())
    elif output == "json":
        sys.stdout.write(_json(df.to_dicts()) + "\n")
    else:
        table = Table(*df.columns)
        for row in df.head(rows).iter_rows():
            table.add_row(*(short(v) for v in row))
        console.print(table)
        console.print(f"{df.height} rows" + (f", first {rows} shown" if df.height > rows else ""))


_FILE_DELETERS = re.compile(r"cleanup_old_files|delete_orphaned_files|expire_snapshots", re.IGNORECASE)


def _check_read_only(query: str) -> None:
    """Raise ValueError unless `query` is one statement that only reads.

    The lake is attached read-only, but DuckDB statements could still write files elsewhere."""
    explain = re.compile(r"\s*EXPLAIN\b(\s+ANALYZE\b)?", re.IGNORECASE)
    if found := _FILE_DELETERS.search(query):  # on a read-only lake they delete files before they fail
        raise ValueError(f"`nbg sql` is read-only and does not take {found[0]}; `nbg compact` looks after files")
    statements = duckdb.extract_statements(query)
    if len(statements) != 1:
        raise ValueError(f"`nbg sql` takes one SQL statement, got {len(statements)}")
    for statement in statements:
        parts = [statement]
        if statement.type == duckdb.StatementType.EXPLAIN:  # EXPLAIN ANALYZE runs the statement that it explains
            parts = duckdb.extract_statements(explain.sub("", statement.query, count=1))
        if other := [part.type.name for part in parts if part.type != duckdb.StatementType.SELECT]:
            raise ValueError(
                "`nbg sql` is read-only and takes queries (SELECT, FROM, DESCRIBE, SHOW, SUMMARIZE, EXPLAIN), not "
                f"{other[0]} statements; use --format csv for a file, FROM name(...) for CALL, and "
                "FROM (PIVOT ... ON column IN (...)) for PIVOT"
            )


def _intervals_as_text(lake: Lake, query: str, snapshot: int | None) -> str:
    """`query` with its columns of type INTERVAL, which polars does not have, as text."""
    (statement,) = duckdb.extract_statements(query)
    query = statement.query.strip().rstrip(";")
    columns = lake.sql(f"DESCRIBE {query}", snapshot=snapshot)
    names = columns.filter(pl.col("column_type").str.contains("INTERVAL"))["column_name"]
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    return f"SELECT * REPLACE ({', '.join(f'{q}::VARCHAR AS {q}' for q in quoted)}) FROM (\n{query}\n)"


def _json(value: object) -> str:
    """`value` as JSON. Infinities and NaN, which JSON does not have, become null."""

    def plain(v: object) -> object:
        if isinstance(v, dict):
            return {k: plain(x) for k, x in v.items()}
        if isinstance(v, list):
            return [plain(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(plain(value), default=str, ensure_ascii=False, allow_nan=False)
