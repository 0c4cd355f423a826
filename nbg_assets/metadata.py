"""What Dagster shows of a materialisation: counts, profile, snapshot, a preview, plots; and each table's columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import dagster as dg
import polars as pl

from nbg_assets.plots import Plot
from nbg_core.config import Profile
from nbg_core.lake import Lake
from nbg_core.schemas import TABLES, sql_type

TABLE_OF = {
    "queries": "queries",
    "student_samples": "samples",
    "filtered_pairs": "pairs",
    "teacher_logits": "teacher_logits",
    "reference_logprobs": "reference_logprobs",
    "student_checkpoint": "checkpoints",
    "student_eval": "evaluations",
}
"""The lake table that holds an asset's rows (others hold what comes with them: scores, rejections, steps)."""

PREVIEW_ROWS = 5
CELL_WIDTH = 60


@dataclass(frozen=True)
class Made:
    """A partition that a worker has just made."""

    asset: str
    slice: str | None
    profile: Profile
    lake: Lake
    report: dict
    seconds: float

    def sql(self, query: str, *params: object) -> pl.DataFrame:
        """Rows as they are now, right after the commit: attaching at its snapshot would cost 0.2 s a step."""
        return self.lake.sql(query, params)


def column_schema(table: str) -> dg.TableSchema:
    """A lake table's columns, types and meanings, as Dagster shows them."""
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


def describe(made: Made, plots: Mapping[str, Callable[[Made], Plot | None]]) -> dict[str, dg.MetadataValue]:
    """The metadata of one materialisation."""
    report = dict(made.report)
    rows = report.pop("rows")
    result = {
        "profile": dg.MetadataValue.text(made.profile.name),
        "snapshot": dg.MetadataValue.int(report.pop("snapshot")),
        "data version": dg.MetadataValue.text(report.pop("data_version")),
        "dagster/row_count" if made.slice is None else "dagster/partition_row_count": dg.MetadataValue.int(rows),
        "new rows": dg.MetadataValue.int(report.pop("new_rows")),
        "wall seconds": dg.MetadataValue.float(round(made.seconds, 2)),
    }
    for name, value in report.items():
        if name not in ("asset", "slice") and value is not None:
            result[name.replace("_", " ")] = _value(value)
    result["preview"] = dg.MetadataValue.md(table(_preview(made)))
    for name, draw in plots.items():
        if plot := draw(made):
            result[name] = dg.MetadataValue.md(plot.markdown())
    return result


def table(df: pl.DataFrame, rows: int = PREVIEW_ROWS) -> str:
    """The first rows as a Markdown table, long cells cut."""
    lines = ["| " + " | ".join(df.columns) + " |", "|" + " --- |" * df.width]
    lines += ["| " + " | ".join(_cell(v) for v in row) + " |" for row in df.head(rows).iter_rows()]
    return "\n".join(lines + ([f"\n{df.height} rows"] if df.height > rows else []))


def _preview(made: Made) -> pl.DataFrame:
    """Rows of the partition, those of its newest commits first: a table also keeps rows of earlier policies."""
    name = TABLE_OF[made.asset]
    lists = [f"{n}[:8] AS {n}" for n, c in TABLES[name].columns().items() if c.dtype == pl.List]
    replace = f" REPLACE ({', '.join(lists)})" if lists else ""
    where, params = ("WHERE t.slice = $1", [made.slice]) if made.slice else ("", [])
    return made.sql(
        f"SELECT t.*{replace} FROM {name} t LEFT JOIN lineage.materialisations m USING (materialisation_id) {where} "
        f"ORDER BY m.created_at DESC, t.{TABLES[name].primary_key()[0]} LIMIT {PREVIEW_ROWS}",
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
    return dg.MetadataValue.text(str(value))
