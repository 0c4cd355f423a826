"""The plots in the Dagster UI: small PNG images inside Markdown, below the size limit of an event.

A colour has the same meaning in all plots: blue is chosen or after training, orange rejected or before training, grey
the teacher.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from nbg_core.lake.queries import CURRENT_SAMPLES, sampled_with
from nbg_core.losses.metrics import METRICS
from nbg_core.losses.metrics import PLOTS as METRIC_PLOTS
from nbg_core.reference import drift
from nbg_core.scorers.scorers import SCORERS

if TYPE_CHECKING:
    from nbg_assets.metadata import Made

MAX_BYTES = 100_000
"""Maximum size of a plot's Markdown; a larger one is not shown."""
BINS = 40
"""Maximum number of bars of a histogram."""
CHOSEN, REJECTED, TEACHER = "#1f77b4", "#ff7f0e", "#7f7f7f"
GREEN, RED, BLACK = "#2ca02c", "#d62728", "#000000"
PALETTE = (CHOSEN, REJECTED, GREEN, RED, "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", TEACHER)
COLOURS = {
    "finished: stop": CHOSEN, "finished: length": REJECTED, "kept pairs": CHOSEN, "verifier": CHOSEN,
    "teacher_loglik": TEACHER, "top (exact)": CHOSEN, "tail (sampled)": REJECTED, "before": REJECTED, "after": CHOSEN,
    "teacher": TEACHER, "loss": BLACK, "dpo": CHOSEN, "kl_chosen": GREEN, "kl_rejected": RED, "chosen_logp": CHOSEN,
    "rejected_logp": REJECTED, "margin": CHOSEN, "accuracy": GREEN, "grad_norm": TEACHER,
}  # fmt: skip
"""Colour by name of the series; the other series take theirs from PALETTE."""


@dataclass(frozen=True)
class Plot:
    png: bytes
    alt: str
    """Alternative text of the image."""

    def markdown(self) -> str:
        text = f"![{self.alt}](data:image/png;base64,{base64.b64encode(self.png).decode()})"
        return text if len(text) < MAX_BYTES else f"{self.alt}: the plot is larger than {MAX_BYTES} bytes"


def response_lengths(made: Made) -> Plot | None:
    """Tokens per response, by finish reason."""
    query = (
        "SELECT 'finished: ' || finish_reason AS name, len(token_ids) AS value FROM samples "
        f"WHERE slice = $1 AND {CURRENT_SAMPLES}"
    )
    return _histogram(made, query, _current_params(made), "response tokens", "response lengths")


def scores(made: Made) -> Plot | None:
    """Newest scores of the slice's current responses, by scorer."""
    query = (
        "SELECT scorer AS name, score AS value FROM scores JOIN samples USING (sample_id) "
        f"WHERE samples.slice = $1 AND {CURRENT_SAMPLES} "
        "QUALIFY row_number() OVER (PARTITION BY sample_id, scorer ORDER BY scores.snapshot_id DESC) = 1"
    )
    used = [name for name, weight in made.profile.preference.weights.items() if weight]
    label = "score; " + ", ".join(f"{name}: {SCORERS[name].unit}" for name in used)
    return _histogram(made, query, _current_params(made), label, "scores of all responses")


def margins(made: Made) -> Plot | None:
    """Margins of the pairs."""
    query = "SELECT 'kept pairs' AS name, margin AS value FROM pairs WHERE slice = $1"
    return _histogram(made, query, [made.slice_name], "chosen score - rejected score", "margins")


def entries_per_position(made: Made) -> Plot | None:
    """Number of stored entries of the teacher's distribution per response position; a confident teacher needs few."""
    query = (
        "SELECT unnest(['top (exact)', 'tail (sampled)']) AS name, unnest([top, tail]) AS value FROM (SELECT "
        "unnest(head_counts) AS top, unnest(tail_counts) AS tail FROM teacher_logits WHERE slice = $1 "
        "AND settings_id = $2 AND model_id = $3)"
    )
    params = [made.slice_name, made.report["storage_id"], made.report["teacher_model_id"]]
    return _histogram(made, query, params, "entries per position", "stored distribution")


def _current_params(made: Made) -> list:
    """The parameters of a query with the slice and CURRENT_SAMPLES, $1 to $6."""
    return [made.slice_name, *sampled_with(made.lake, made.require_slice()).params]


def sampler_drift(made: Made) -> Plot | None:
    """Tokens by the distance of the sampler's log-prob from the reference's. The line is the bound of the check
    `sampler_agrees`."""
    df = drift.histogram(made.lake, made.require_slice())
    if df.is_empty():
        return None
    figure, axes = _figure("sampler drift")
    axes.bar(df["log10"].to_list(), df["tokens"].to_list(), width=0.25, align="edge", color=CHOSEN)
    axes.axvline(math.log10(drift.BOUND), color=REJECTED, label=f"bound, {drift.BOUND} nats")
    axes.set_xlabel("log10 of |sampler - reference| log-prob, nats per token")
    axes.legend(fontsize=8)
    return _plot(figure, "sampler drift")


def metric_curves(title: str) -> Callable[[Made], Plot | None]:
    """The metrics whose `plot` is `title` (`losses.metrics`) over the optimizer steps."""
    names = [metric.name for metric in METRICS if metric.plot == title]

    def draw(made: Made) -> Plot | None:
        df = made.sql(
            f"SELECT step, {', '.join(names)} FROM training_steps WHERE training_id = $1 ORDER BY step",
            made.report["training_id"],
        )
        if df.is_empty():
            return None
        figure, axes = _figure(title)
        for i, name in enumerate(names):
            axes.plot(df["step"].to_list(), df[name].to_list(), label=name, color=_colour(name, i), linewidth=1.2)
        axes.set_xlabel("optimizer step")
        axes.legend(fontsize=8)
        return _plot(figure, title)

    return draw


def accuracies(made: Made) -> Plot | None:
    """Held-out accuracy per slice: before training, after it, and the teacher's, with 95% intervals."""
    rows = made.report["summary"]
    figure, axes = _figure("held-out accuracy, 95% intervals")
    for i, role in enumerate(("before", "after", "teacher")):
        x = [j + (i - 1) * 0.27 for j in range(len(rows))]
        value = [row[role] for row in rows]
        below = [max(row[role] - row[f"{role}_low"], 0) for row in rows]
        above = [max(row[f"{role}_high"] - row[role], 0) for row in rows]
        axes.bar(x, value, 0.25, yerr=[below, above], label=role, color=_colour(role, i), capsize=3)
    labels = [row["slice"] for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=20 if len(rows) > 5 else 0)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _plot(figure, "held-out accuracy")


PLOTS: dict[str, Callable[[Made], Plot | None]] = {
    "response lengths": response_lengths,
    "scores": scores,
    "margins": margins,
    "stored distribution": entries_per_position,
    "sampler drift": sampler_drift,
    **{title: metric_curves(title) for title in METRIC_PLOTS},
    "accuracy": accuracies,
}
"""The plots that `Asset.plots` may name. The name is the metadata key in Dagster."""


def _colour(name: str, i: int) -> str:
    """The colour of series `name`, the i-th of its plot."""
    return COLOURS.get(name) or PALETTE[i % len(PALETTE)]


def _histogram(made: Made, query: str, params: list, label: str, title: str) -> Plot | None:
    """A histogram of the column `value` of a query, one colour per value of the column `name`.

    DuckDB counts the rows of each bar, so that only the counts are read into this process."""
    whole = f"bool_and(value = floor(value)) AND max(value) - min(value) < {BINS}"  # then each number gets a bar
    df = made.sql(
        f"WITH v AS ({query}), r AS (SELECT min(value)::DOUBLE AS low, max(value)::DOUBLE AS high, {whole} AS whole "
        f"FROM v), w AS (SELECT *, CASE WHEN whole THEN 1.0 WHEN high > low THEN (high - low) / {BINS} ELSE 1.0 END "
        "AS width FROM r) SELECT name, CASE WHEN whole THEN value - low ELSE "
        f"least(floor((value - low) / width), {BINS - 1}) END::INT AS bin, count(*) AS n, any_value(low) AS low, "
        "any_value(width) AS width, any_value(whole) AS whole FROM v, w GROUP BY ALL ORDER BY name, bin",
        *params,
    )
    if df.is_empty():
        return None
    figure, axes = _figure(title)
    low, width, whole = df.row(0, named=True)["low"], df["width"][0], df["whole"][0]
    start = low - width / 2 if whole else low
    edges = [start + i * width for i in range(max(df["bin"].to_list()) + 2)]
    names = df["name"].unique(maintain_order=True).to_list()
    parts = [df.filter(pl.col("name") == name) for name in names]
    axes.hist(
        [[start + (b + 0.5) * width for b in part["bin"]] for part in parts], bins=edges,
        weights=[part["n"].to_list() for part in parts], label=names,
        color=[_colour(n, i) for i, n in enumerate(names)],
    )  # fmt: skip
    axes.set_xlabel(label)
    axes.legend(fontsize=8)
    return _plot(figure, title)


def _figure(title: str):
    from matplotlib.figure import Figure  # not pyplot, which keeps global state and chooses a backend

    figure = Figure(figsize=(6, 3), dpi=90, layout="tight")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    return figure, axes


def _plot(figure, alt: str) -> Plot:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Plot(buffer.getvalue(), alt)
