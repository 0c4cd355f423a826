"""Small plots for the Dagster UI: PNG inside Markdown, kept below the 100 kB an event can carry.

Colours tell the same thing everywhere: chosen or after training blue, rejected or before orange, teacher grey.
"""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from nbg_core import drift, lineage

if TYPE_CHECKING:
    from nbg_assets.metadata import Made

MAX_BYTES = 100_000
BINS = 40
CHOSEN, REJECTED, TEACHER = "#1f77b4", "#ff7f0e", "#7f7f7f"


@dataclass(frozen=True)
class Plot:
    png: bytes
    alt: str

    def markdown(self) -> str:
        text = f"![{self.alt}](data:image/png;base64,{base64.b64encode(self.png).decode()})"
        return text if len(text) < MAX_BYTES else f"{self.alt}: the plot is larger than {MAX_BYTES} bytes"


def response_lengths(made: Made) -> Plot | None:
    """Tokens per response, truncated ones apart."""
    query = f"SELECT 'finished: ' || finish_reason AS name, len(token_ids) AS value FROM samples s WHERE {_CURRENT}"
    colours = {"finished: stop": CHOSEN, "finished: length": REJECTED}
    return _histogram(made, query, _current(made), "response tokens", "response lengths", colours)


def scores(made: Made) -> Plot | None:
    """Scores of the slice's present responses by scorer."""
    query = (
        "SELECT scorer AS name, score AS value FROM scores JOIN samples s USING (sample_id) "
        f"JOIN lineage.materialisations m ON m.materialisation_id = scores.materialisation_id WHERE {_CURRENT} "
        "QUALIFY row_number() OVER (PARTITION BY sample_id, scorer ORDER BY m.created_at DESC) = 1"
    )
    colours = {"verifier": CHOSEN, "teacher_loglik": TEACHER}
    return _histogram(made, query, _current(made), "score", "scores of all responses", colours)


def margins(made: Made) -> Plot | None:
    """Margins of the kept pairs."""
    query = "SELECT 'kept pairs' AS name, margin AS value FROM pairs WHERE slice = $1"
    return _histogram(made, query, [made.slice], "chosen score - rejected score", "margins", {"kept pairs": CHOSEN})


def entries_per_position(made: Made) -> Plot | None:
    """Entries stored per response position: how peaked the teacher is."""
    query = (
        "SELECT unnest(['head (exact)', 'tail (sampled)']) AS name, unnest([head, tail]) AS value FROM (SELECT "
        "unnest(head_counts) AS head, unnest(tail_counts) AS tail FROM teacher_logits WHERE slice = $1 "
        "AND settings_id = $2)"
    )
    params = [made.slice, made.profile.storage_id()]
    colours = {"head (exact)": CHOSEN, "tail (sampled)": REJECTED}
    return _histogram(made, query, params, "entries per position", "stored distribution", colours)


_CURRENT = (
    "s.slice = $1 AND s.sampling_id = $2 "
    "AND (s.model_id = $3 AND s.sample_index < $4 OR s.model_id = $5 AND s.sample_index < $6)"
)
"""Leaves out responses of earlier policies and settings, which stay in the table."""


def _current(made: Made) -> list:
    """Parameters of _CURRENT: what the slice was last sampled with."""
    sampled = json.loads(lineage.latest(made.lake, "student_samples", made.slice)["settings"])
    return [made.slice, *(sampled[k] for k in ("sampling_id", "student", "n_student", "teacher", "n_teacher"))]


def sampler_drift(made: Made) -> Plot | None:
    """Tokens by how far the sampler's log-prob is from the reference's; the line is the bound of the check."""
    df = drift.histogram(made.lake, made.slice)
    if df.is_empty():
        return None
    figure, axes = _figure("sampler drift")
    axes.bar(df["log10"].to_list(), df["tokens"].to_list(), width=0.25, align="edge", color=CHOSEN)
    axes.axvline(math.log10(drift.BOUND), color=REJECTED, label=f"bound, {drift.BOUND} nats")
    axes.set_xlabel("log10 of |sampler - reference| log-prob, nats a token")
    axes.legend(fontsize=8)
    return _plot(figure, "sampler drift")


def losses(made: Made) -> Plot | None:
    """Joint loss and its terms over the optimizer steps."""
    return _curves(made, "losses", {"loss": "#000000", "dpo": CHOSEN, "kl_chosen": "#2ca02c", "kl_rejected": "#d62728"})


def log_probabilities(made: Made) -> Plot | None:
    """Sequence log-probabilities of chosen and rejected: does the chosen fall?"""
    return _curves(made, "log-probabilities, nats", {"chosen_logp": CHOSEN, "rejected_logp": REJECTED})


def margin_and_accuracy(made: Made) -> Plot | None:
    """Reward margin, and share of pairs with a positive one."""
    return _curves(made, "reward margin and accuracy", {"margin": CHOSEN, "accuracy": "#2ca02c"})


def gradient_norm(made: Made) -> Plot | None:
    """Global gradient norm before clipping."""
    return _curves(made, "gradient norm", {"grad_norm": TEACHER})


def accuracies(made: Made) -> Plot | None:
    """Held-out accuracy per slice, before and after training and of the teacher, with 95% intervals."""
    rows = made.report["summary"]
    figure, axes = _figure("held-out accuracy, 95% intervals")
    for i, (role, colour) in enumerate({"before": REJECTED, "after": CHOSEN, "teacher": TEACHER}.items()):
        x = [j + (i - 1) * 0.27 for j in range(len(rows))]
        value = [row[role] for row in rows]
        below = [max(row[role] - row[f"{role}_low"], 0) for row in rows]
        above = [max(row[f"{role}_high"] - row[role], 0) for row in rows]
        axes.bar(x, value, 0.25, yerr=[below, above], label=role, color=colour, capsize=3)
    axes.set_xticks(range(len(rows)), [row["slice"] for row in rows], rotation=20 if len(rows) > 5 else 0)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _plot(figure, "held-out accuracy")


def _curves(made: Made, title: str, columns: dict[str, str]) -> Plot | None:
    df = made.sql(
        f"SELECT step, {', '.join(columns)} FROM training_steps WHERE training_id = "
        "(SELECT training_id FROM checkpoints WHERE checkpoint_id = $1 ORDER BY created_at DESC LIMIT 1) ORDER BY step",
        made.report["data_version"],
    )
    if df.is_empty():
        return None
    figure, axes = _figure(title)
    for name, colour in columns.items():
        axes.plot(df["step"].to_list(), df[name].to_list(), label=name, color=colour, linewidth=1.2)
    axes.set_xlabel("optimizer step")
    axes.legend(fontsize=8)
    return _plot(figure, title)


def _histogram(made: Made, query: str, params: list, label: str, title: str, colours: dict[str, str]) -> Plot | None:
    """Bars of the `value` of a query's rows, by `name`. The lake counts: only counts come into this process."""
    whole = f"bool_and(value = floor(value)) AND max(value) - min(value) < {BINS}"  # one bar per number
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
    edges = [start + i * width for i in range(df["bin"].max() + 2)]
    names = df["name"].unique(maintain_order=True).to_list()
    parts = [df.filter(pl.col("name") == name) for name in names]
    axes.hist(
        [[start + (b + 0.5) * width for b in part["bin"]] for part in parts], bins=edges,
        weights=[part["n"].to_list() for part in parts], label=names, color=[colours[n] for n in names],
    )  # fmt: skip
    axes.set_xlabel(label)
    axes.legend(fontsize=8)
    return _plot(figure, title)


def _figure(title: str):
    from matplotlib.figure import Figure  # no pyplot: no global state, no backend to choose; drawn by Agg

    figure = Figure(figsize=(6, 3), dpi=90, layout="tight")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    return figure, axes


def _plot(figure, alt: str) -> Plot:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Plot(buffer.getvalue(), alt)
