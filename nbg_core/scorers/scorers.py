"""Scorers, which give a response a number. A scorer is one entry of SCORERS, and everything else follows from it.

From an entry follow the key in `preference.weights` of a profile, the rows of table `scores`, the settings that make
`filtered_pairs` stale, the report and the plot. A scorer of weight 0 does not run. Scores are kept in the lake under
`scorer_id`, a hash of everything that a score depends on besides the response, so a response is scored once.

A frame `samples` has one row per response, with the columns sample_id, query_id, source, finish_reason,
prompt_token_ids, token_ids and text, and those of its query: prompt, answer, verifier and verifier_args.
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
"""Responses that `by_response` scores per commit; a crash loses at most this many scores."""


class Context(Protocol):
    """The parts of a run that a scorer may use. The stage `filtered_pairs` implements it."""

    def identity(self, name: str) -> Any:
        """The value of an entry of `config.identity.IDENTITIES` that the scorer depends on (`Scorer.depends_on`)."""

    def progress(self, total: int) -> Progress:
        """A progress log over `total` responses, under the scorer's name."""

    def teacher_logprobs(self, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Frames (sample_id, token_logprobs) of `samples`, a chunk at a time: the teacher's log-probability of each
        response token, in nats."""


@dataclass(frozen=True)
class Scorer:
    """A way to give a response a number; higher is better."""

    name: str
    """Key in `preference.weights`, and value of column `scores.scorer`."""
    unit: str
    """Unit of the score."""
    meaning: str
    """How the score is made, in words."""
    compute: Callable[[Context, pl.DataFrame], Iterator[pl.DataFrame]]
    """(context, samples) -> frames (sample_id, score), a chunk at a time; each is committed before the next is made."""
    version: str = "1"
    """Raise it when the scorer gives other scores than before: responses are then scored again."""
    depends_on: Sequence[str] = ()
    """Names in `config.identity.IDENTITIES`: models and settings that a score depends on. A change of their values
    makes `filtered_pairs` stale."""
    ids_of_queries: Callable[[pl.DataFrame], pl.DataFrame] | None = None
    """For a score that depends on the response's query too: samples -> frame (sample_id, scorer_id) of those responses
    that the scorer applies to. Without it, it applies to all, with one scorer_id."""

    def ids(self, context: Context, samples: pl.DataFrame) -> pl.DataFrame:
        """Frame (sample_id, scorer_id) of the responses that the scorer applies to."""
        if self.ids_of_queries is not None:
            return self.ids_of_queries(samples)
        version = [self.version] if self.version != "1" else []
        values = [value for name in self.depends_on if (value := context.identity(name)) is not None]
        return samples.select("sample_id", scorer_id=pl.lit(digest(self.name, *version, *values)))


def by_response(score: Callable[[dict], float]) -> Callable[[Context, pl.DataFrame], Iterator[pl.DataFrame]]:
    """Make the `compute` of a scorer that looks at one response at a time: `score` gets a row of `samples`."""

    def compute(context: Context, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
        progress = context.progress(samples.height)
        for chunk in samples.iter_slices(CHUNK):
            scores = [score(row) for row in chunk.iter_rows(named=True)]
            yield chunk.select("sample_id").with_columns(pl.Series("score", scores, dtype=pl.Float64))
            progress.advance(chunk.height)

    return compute


def once_per_text(score: Callable[[dict], float]) -> Callable[[Context, pl.DataFrame], Iterator[pl.DataFrame]]:
    """`by_response` for a score that depends on nothing but query and text: equal texts in a chunk are scored once."""

    def compute(context: Context, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
        known: dict[tuple[str, str], float] = {}  # (query_id, text) -> score

        def once(row: dict) -> float:
            key = (row["query_id"], row["text"])
            if key not in known:
                known[key] = score(row)
            return known[key]

        for frame in by_response(once)(context, samples):
            yield frame
            known.clear()

    return compute


def _verifier_ids(samples: pl.DataFrame) -> pl.DataFrame:
    verified = samples.filter(pl.col("verifier").is_not_null())
    return verified.select("sample_id").with_columns(verifiers.scorer_ids(verified))


def _verify(row: dict) -> float:
    """The verifier's score of a row of `samples`. Raises SpecError naming the query whose verifier cannot work."""
    args = json.loads(row["verifier_args"] or "{}")
    try:
        return verifiers.verify(row["text"], row["answer"], row["verifier"], args, row["prompt"])
    except verifiers.SpecError as e:
        raise verifiers.SpecError(f"query {row['query_id']}: {e}; correct its row in the query file") from e


LEAST_LOGLIK = -1e4
"""Lowest score, in nats per token: that of a response with a token that the teacher rules out, since the table takes no
infinities."""


def _loglik(context: Context, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
    for chunk in context.teacher_logprobs(samples):
        mean = pl.col("token_logprobs").cast(pl.List(pl.Float64)).list.mean()
        yield chunk.select("sample_id", score=mean.clip(LEAST_LOGLIK))


SCORERS: dict[str, Scorer] = {
    s.name: s
    for s in (
        Scorer("verifier", "share right, 0 to 1", "score by the query's verifier; a query without one has none",
               once_per_text(_verify), version=verifiers.VERSION, ids_of_queries=_verifier_ids),
        Scorer("teacher_loglik", "nats per token", "mean teacher log-probability of the response's tokens",
               _loglik, depends_on=("teacher", "scoring_id", "loglik_engine")),
    )
}  # fmt: skip
