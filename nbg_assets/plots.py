"""Small plots for the Dagster UI: PNG inside Markdown, kept below the 100 kB an event can carry.

Colours tell the same thing everywhere: chosen or after training blue, rejected or before orange, teacher grey.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from nbg_core import drift

if TYPE_CHECKING:
    from nbg_assets.metadata import Made

MAX_BYTES = 100_000
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
    df = made.sql(
        "SELECT len(token_ids) AS n, finish_reason FROM samples WHERE slice = $1 AND sampling_id = $2 ORDER BY ALL",
        made.slice,
        made.profile.sampling_id(),
    )
    groups = {
        f"finished: {reason}": df.filter(pl.col("finish_reason") == reason)["n"].to_list()
        for reason in ("stop", "length")
    }
    return _histogram(groups, "response tokens", "response lengths", [CHOSEN, REJECTED])


def scores(made: Made) -> Plot | None:
    """Scores of the slice's responses by scorer."""
    df = made.sql("SELECT scorer, score FROM scores WHERE slice = $1 ORDER BY scorer, sample_id", made.slice)
    groups = {str(name): part["score"].to_list() for (name,), part in df.group_by("scorer", maintain_order=True)}
    return _histogram(groups, "score", "scores of all responses", [CHOSEN, TEACHER])


def margins(made: Made) -> Plot | None:
    """Margins of the kept pairs."""
    df = made.sql("SELECT margin FROM pairs WHERE slice = $1 ORDER BY pair_id", made.slice)
    return _histogram({"kept pairs": df["margin"].to_list()}, "chosen score - rejected score", "margins", [CHOSEN])


def entries_per_position(made: Made) -> Plot | None:
    """Entries stored per response position: how peaked the teacher is."""
    df = made.sql(
        "SELECT unnest(head_counts) AS head, unnest(tail_counts) AS tail FROM teacher_logits WHERE slice = $1 "
        "AND settings_id = $2 ORDER BY sample_id LIMIT 200000",
        made.slice,
        made.profile.storage_id(),
    )
    groups = {"head (exact)": df["head"].to_list(), "tail (sampled)": df["tail"].to_list()}
    return _histogram(groups, "entries per position", "stored distribution", [CHOSEN, REJECTED])


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


def _histogram(groups: dict[str, list[float]], label: str, title: str, colours: list[str]) -> Plot | None:
    groups = {name: values for name, values in groups.items() if values}
    if not groups:
        return None
    figure, axes = _figure(title)
    values = [v for group in groups.values() for v in group]
    low, high = min(values), max(values)
    whole = isinstance(values[0], int) and high - low < 60  # one bar per number
    bins = [low - 0.5 + i for i in range(int(high - low) + 2)] if whole else 30
    axes.hist(list(groups.values()), bins=bins, label=list(groups), color=colours[: len(groups)])
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
