"""Scorers: what gives one response a number. A scorer is one row of SCORERS, and everything else follows from it.

What follows: the key in `preference.weights` of a profile, the rows of table `scores`, the settings that make
`filtered_pairs` stale, the report and the plot. A scorer of weight 0 does not run. Scores are kept in the lake under
`scorer_id`, a hash of everything that a score depends on besides the response, so a response is scored once.

`samples` frames have a row per response: sample_id, query_id, source, finish_reason, prompt_token_ids, token_ids, text,
and of its query prompt, answer, verifier, verifier_args.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from nbg_core.base.ids import digest
from nbg_core.scorers import verifiers

if TYPE_CHECKING:
    from nbg_core.base.progress import Progress

CHUNK = 2048
"""Responses scored per commit by a function of one response: what a crash can lose."""


class Context(Protocol):
    """What the stage `filtered_pairs` gives a scorer."""

    def identity(self, name: str) -> Any:
        """The value of an identity that the scorer depends on (`Scorer.depends_on`)."""

    def progress(self, total: int) -> Progress:
        """Progress over `total` responses, under the scorer's name."""

    def teacher_logprobs(self, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Frames (sample_id, token_logprobs) of `samples` under the teacher, a chunk at a time."""


@dataclass(frozen=True)
class Scorer:
    name: str
    """Key in `preference.weights`, and `scores.scorer`."""
    unit: str
    """Unit of the score; higher is better."""
    meaning: str
    ids: Callable[[Context, pl.DataFrame], pl.DataFrame]
    """(sample_id, scorer_id) of those `samples` that the scorer applies to."""
    compute: Callable[[Context, pl.DataFrame], Iterator[pl.DataFrame]]
    """Frames (sample_id, score) of `samples`, a chunk at a time; each is committed before the next is asked for."""
    depends_on: Sequence[str] = ()
    """Names in `assets.IDENTITIES`: models and settings that the score depends on."""


def one_id(*parts: str) -> Callable[[Context, pl.DataFrame], pl.DataFrame]:
    """`ids` of a scorer that applies to every response and depends on nothing else: `parts` are its name and version."""
    return lambda context, samples: samples.select("sample_id", scorer_id=pl.lit(digest(*parts)))


def by_response(score: Callable[[dict], float]) -> Callable[[Context, pl.DataFrame], Iterator[pl.DataFrame]]:
    """`compute` of a scorer that is a function of one response, a row of `samples`.

    Responses to one query with one text are scored once."""

    def compute(context: Context, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
        progress = context.progress(samples.height)
        for chunk in samples.iter_slices(CHUNK):
            known: dict[tuple[str, str], float] = {}
            scores = []
            for row in chunk.iter_rows(named=True):
                key = (row["query_id"], row["text"])
                if key not in known:
                    known[key] = score(row)
                scores.append(known[key])
            yield chunk.select("sample_id").with_columns(pl.Series("score", scores, dtype=pl.Float64))
            progress.advance(chunk.height)

    return compute


def _verifier_ids(context: Context, samples: pl.DataFrame) -> pl.DataFrame:
    rows = samples.filter(pl.col("verifier").is_not_null())
    return rows.select("sample_id").with_columns(verifiers.scorer_ids(rows))


def _verify(row: dict) -> float:
    """Raises SpecError naming the query whose verifier cannot work."""
    args = json.loads(row["verifier_args"] or "{}")
    try:
        return verifiers.verify(row["text"], row["answer"], row["verifier"], args, row["prompt"])
    except verifiers.SpecError as e:
        raise verifiers.SpecError(f"query {row['query_id']}: {e}; correct its row in the query file") from e


def _loglik_ids(context: Context, samples: pl.DataFrame) -> pl.DataFrame:
    parts = [context.identity(name) for name in ("teacher", "scoring_id")]
    engine = context.identity("teacher_engine")
    by = [engine] if engine[0] == "vllm" else []  # versions of transformers agree up to rounding
    return one_id("teacher_loglik", *parts, *by)(context, samples)


def _loglik(context: Context, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
    for chunk in context.teacher_logprobs(samples):
        yield chunk.select("sample_id", score=pl.col("token_logprobs").cast(pl.List(pl.Float64)).list.mean())


SCORERS: dict[str, Scorer] = {
    s.name: s
    for s in (
        Scorer("verifier", "share right, 0 to 1", "the query's own verifier; none for a query without one",
               _verifier_ids, by_response(_verify)),
        Scorer("teacher_loglik", "nats a token", "mean teacher log-probability of the response's tokens",
               _loglik_ids, _loglik, depends_on=("teacher", "scoring_id")),
    )
}  # fmt: skip
