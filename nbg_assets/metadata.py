"""The metadata that Dagster shows: report, preview and plots of a materialisation, and the columns of an asset."""

from __future__ import annotations

from dataclasses import dataclass

import dagster as dg
import polars as pl

from nbg_assets import plots
from nbg_core.assets import Asset
from nbg_core.config.profile import Profile
from nbg_core.lake.lake import Lake
from nbg_core.lake.tables import TABLES, sql_type

PREVIEW_ROWS = 5
CELL_WIDTH = 60
"""Maximum number of characters of a table cell."""


@dataclass(frozen=True)
class Made:
    """A partition that a worker has just made."""

    asset: Asset
    slice_name: str | None
    profile: Profile
    lake: Lake
    report: dict
    """Fields of the worker's report (`lineage.run.Report`) by name."""
    seconds: float
    """Wall time of the worker."""

    def require_slice(self) -> str:
        """The slice name. Raises ValueError for an asset without partitions."""
        if self.slice_name is None:
            raise ValueError(f"{self.asset.name} has no partitions; this plot is for an asset that has")
        return self.slice_name

    def sql(self, query: str, *params: object) -> pl.DataFrame:
        """The result of a query on the newest snapshot, which right after the commit is the commit's own.

        Reading at the commit's snapshot by number would attach the lake once more, which takes 0.2 s."""
        return self.lake.sql(query, params)


def column_schema(table: str) -> dg.TableSchema:
    """The columns of a lake table with their types and descriptions."""
    columns = TABLES[table].columns()
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                name,
                type=sql_type(column.dtype),
                description=column.description,
                constraints=dg.TableColumnConstraints(nullable=column.nullable),
            )
            for name, column in columns.items()
        ]
    )


def describe(made: Made) -> dict[str, dg.MetadataValue]:
    """The metadata of one materialisation: every field of the worker's report, a preview and the asset's plots."""
    report = dict(made.report)
    rows = report.pop("rows")
    result: dict[str, dg.MetadataValue] = {
        "profile": dg.MetadataValue.text(made.profile.name),
        "snapshot": dg.MetadataValue.int(report.pop("snapshot")),
        "data version": dg.MetadataValue.text(report.pop("data_version")),
        "dagster/row_count" if made.slice_name is None else "dagster/partition_row_count": dg.MetadataValue.int(rows),
        "new rows": dg.MetadataValue.int(report.pop("new_rows")),
        "wall seconds": dg.MetadataValue.float(round(made.seconds, 2)),
    }
    for name, value in report.items():
        if name not in ("asset", "slice") and value is not None:
            result[name.replace("_", " ")] = _value(value)
    result["preview"] = dg.MetadataValue.md(table(_preview(made)))
    for name in made.asset.plots:
        try:
            if plot := plots.PLOTS[name](made):
                result[name] = dg.MetadataValue.md(plot.markdown())
        except Exception as e:  # the partition is committed, so an error in a plot must not fail the step
            result[name] = dg.MetadataValue.text(f"could not be drawn: {type(e).__name__}: {e}")
    return result


def table(df: pl.DataFrame, rows: int = PREVIEW_ROWS) -> str:
    """The first `rows` of a frame as a Markdown table; long cells are shortened."""
    lines = ["| " + " | ".join(df.columns) + " |", "|" + " --- |" * df.width]
    lines += ["| " + " | ".join(_cell(v) for v in row) + " |" for row in df.head(rows).iter_rows()]
    return "\n".join(lines + ([f"\n{df.height} rows"] if df.height > rows else []))


def _preview(made: Made) -> pl.DataFrame:
    """Rows of the partition, newest commits first, because a table also keeps the rows of earlier policies."""
    name = made.asset.tables[0]
    lists = [f"{n}[:8] AS {n}" for n, c in TABLES[name].columns().items() if c.dtype == pl.List]
    replace = f" REPLACE ({', '.join(lists)})" if lists else ""
    where, params = ("WHERE t.slice = $1", [made.slice_name]) if made.slice_name else ("", [])
    return made.sql(
        f"SELECT t.*{replace} FROM {name} t {where} "
        f"ORDER BY snapshot_id DESC, {TABLES[name].primary_key()[0]} LIMIT {PREVIEW_ROWS}",
        *params,
    )


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= CELL_WIDTH else text[: CELL_WIDTH - 1] + "…"


def _value(value: object) -> dg.MetadataValue:
    match value:
        case bool():
            return dg.MetadataValue.bool(value)
        case int():
            return dg.MetadataValue.int(value)
        case float():
            return dg.MetadataValue.float(value)
        case list() if value and all(isinstance(row, dict) for row in value):
            return dg.MetadataValue.md(table(pl.DataFrame(value), rows=len(value)))
        case dict() | list():
            return dg.MetadataValue.json(value)
        case _:  # text, paths, None
            return dg.MetadataValue.text(str(value))
