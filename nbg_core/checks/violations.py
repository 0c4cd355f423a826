"""The queries of the checks. Each function returns the rows that break a check's rule; none if the check passes.

A partition is compared with the settings that it was made with (`Subject.made_with`), not with the current profile. In
the SQL, $1 is the slice name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from nbg_core.base.names import find
from nbg_core.config.profile import Profile
from nbg_core.config.slices import slice_names
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import (
    CURRENT_SAMPLES,
    RESPONSES_OF_PAIRS,
    made_with,
    sampled_with,
)
from nbg_core.lake.teacher_columns import ROW_IS_WHOLE
from nbg_core.lineage.policy import current_policy
from nbg_core.modeling.config_file import text_config_value
from nbg_core.reference import drift

MASS_SAMPLE = 200
"""Number of responses whose probabilities are summed. Ids are hashes, so the first by id are a random sample."""

WARN_SHARE = 0.2
"""Share of truncated or empty responses above which a check warns."""

RESPONSES = f"(SELECT sample_id, token_ids FROM samples SEMI JOIN {RESPONSES_OF_PAIRS} USING (sample_id))"
"""SQL of the responses of a slice's pairs: sample_id, token_ids. $1 is the slice name."""

SCORED_BY = {"teacher_logits": ("teacher", "storage_id"), "reference_logprobs": ("reference", "scoring_id")}
"""Assets with a row per response and model -> names of the model id and of the settings_id in the asset's settings."""


@dataclass(frozen=True)
class Subject:
    """The partition that a check looks at, in the lake's newest snapshot."""

    lake: Lake
    profile: Profile
    asset: str
    slice_name: str | None

    def require_slice(self) -> str:
        """The slice name. Raises ValueError for an asset without partitions."""
        if self.slice_name is None:
            raise ValueError(f"{self.asset} has no partitions; this check needs an asset that has")
        return self.slice_name

    def sql(self, query: str, *params: object) -> pl.DataFrame:
        return self.lake.sql(query, params)

    def made_with(self) -> dict:
        """The settings that the partition was last made with. The profile may have changed since."""
        return made_with(self.lake, self.asset, self.slice_name)


def train_eval_overlap(s: Subject) -> pl.DataFrame:
    """Queries of the slice that have the text of a query of the other split, in any slice that has a query file."""
    text = "trim(regexp_replace(array_to_string(list_transform(messages, m -> m.content), ' '), '\\s+', ' ', 'g'))"
    return s.sql(
        f"WITH q AS (SELECT query_id, slice, split, {text} AS text FROM queries) "
        "SELECT a.query_id, a.split, b.query_id AS other_id, b.split AS other_split, b.slice AS other_slice "
        "FROM q a JOIN q b USING (text) WHERE a.slice = $1 AND a.split <> b.split AND b.slice IN (SELECT unnest($2)) "
        "ORDER BY ALL",
        s.slice_name,
        slice_names(s.profile),
    )


def no_rows_of_split(split: str) -> Callable[[Subject], pl.DataFrame]:
    """One row if the slice has no query of `split` ('train' or 'eval')."""

    def violations(s: Subject) -> pl.DataFrame:
        return s.sql(
            "SELECT $1 AS slice, $2 AS split WHERE NOT EXISTS (FROM queries WHERE slice = $1 AND split = $2)",
            s.slice_name,
            split,
        )

    return violations


def too_few_responses(s: Subject) -> pl.DataFrame:
    """Training queries with fewer responses than n_student + n_teacher of the newest sampling."""
    return s.sql(
        "SELECT q.query_id, count(samples.sample_id) AS responses FROM queries q LEFT JOIN samples "
        f"ON samples.query_id = q.query_id AND {CURRENT_SAMPLES} "
        "WHERE q.slice = $1 AND q.split = 'train' GROUP BY q.query_id HAVING responses < $4 + $6 ORDER BY ALL",
        s.slice_name,
        *sampled_with(s.lake, s.require_slice()).params,
    )


def outside_vocabulary(s: Subject) -> pl.DataFrame:
    """Responses without tokens, with another number of log-probs than tokens, or with ids outside the vocabulary."""
    folder = current_policy(s.lake, s.profile).path
    size = text_config_value(folder, "vocab_size")
    if size is None:
        return pl.DataFrame({"why": [f"{folder / 'config.json'} does not say vocab_size"]})
    return s.sql(
        "SELECT sample_id, len(token_ids) AS tokens, list_max(token_ids) AS largest FROM samples WHERE slice = $1 "
        "AND (len(token_ids) = 0 OR len(token_ids) <> len(logprobs) OR list_min(token_ids) < 0 "
        "OR list_max(token_ids) >= $2) ORDER BY sample_id",
        s.slice_name,
        size,
    )


def share_of_responses(condition: str) -> Callable[[Subject], pl.DataFrame]:
    """The sources (student, teacher) for which `condition` holds for a share above WARN_SHARE of the responses."""

    def violations(s: Subject) -> pl.DataFrame:
        return s.sql(
            f"SELECT source, avg(({condition})::INT) AS share, count(*) AS responses FROM samples WHERE slice = $1 "
            f"AND {CURRENT_SAMPLES} GROUP BY source HAVING share > $7 ORDER BY source",
            s.slice_name,
            *sampled_with(s.lake, s.require_slice()).params,
            WARN_SHARE,
        )

    return violations


def narrow_margins(s: Subject) -> pl.DataFrame:
    """Pairs with a margin below `preference.min_margin`, or one that is not the difference of the two scores."""
    return s.sql(
        "SELECT pair_id, chosen_score, rejected_score, margin FROM pairs WHERE slice = $1 "
        "AND (margin < $2 OR abs(margin - (chosen_score - rejected_score)) > 1e-6) ORDER BY pair_id",
        s.slice_name,
        s.made_with()["min_margin"] - 1e-9,
    )


def unknown_responses(s: Subject) -> pl.DataFrame:
    """Pairs whose chosen or rejected response does not exist, or answers another query."""
    return s.sql(
        "SELECT pair_id, chosen_id, rejected_id FROM pairs p LEFT JOIN samples c ON c.sample_id = p.chosen_id "
        "LEFT JOIN samples r ON r.sample_id = p.rejected_id WHERE p.slice = $1 AND "
        "(c.query_id IS DISTINCT FROM p.query_id OR r.query_id IS DISTINCT FROM p.query_id) ORDER BY pair_id",
        s.slice_name,
    )


def truncated_positives(s: Subject) -> pl.DataFrame:
    """Pairs with a truncated chosen response, unless `preference.truncated_positive` allows them."""
    return s.sql(
        "SELECT pair_id, chosen_id FROM pairs p JOIN samples c ON c.sample_id = p.chosen_id "
        "WHERE p.slice = $1 AND c.finish_reason = 'length' AND NOT $2 ORDER BY pair_id",
        s.slice_name,
        s.made_with()["truncated_positive"],
    )


def held_out_pairs(s: Subject) -> pl.DataFrame:
    """Pairs whose query is not a training query."""
    return s.sql(
        "SELECT pair_id, query_id, split FROM pairs LEFT JOIN queries USING (query_id) "
        "WHERE pairs.slice = $1 AND split IS DISTINCT FROM 'train' ORDER BY pair_id",
        s.slice_name,
    )


def no_pairs(s: Subject) -> pl.DataFrame:
    """One row if the slice has no pair."""
    return s.sql("SELECT $1 AS slice WHERE NOT EXISTS (FROM pairs WHERE slice = $1)", s.slice_name)


def not_scored_once(s: Subject) -> pl.DataFrame:
    """Responses of pairs with no row, or several, of the model and settings that the partition was made with."""
    where, params = _made_rows(s)
    return s.sql(
        f"SELECT r.sample_id, count(t.sample_id) AS rows_found FROM {RESPONSES} r LEFT JOIN "
        f"(FROM {s.asset} WHERE {where}) t USING (sample_id) GROUP BY ALL HAVING rows_found <> 1 ORDER BY ALL",
        s.slice_name,
        *params,
    )


def wrong_lengths(s: Subject) -> pl.DataFrame:
    """Responses with a list whose length does not fit the number of tokens, or with a log-prob above 0."""
    wrong = "len(token_logprobs) <> len(token_ids) OR list_max(token_logprobs) > 1e-5"
    if s.asset == "teacher_logits":
        wrong += f" OR NOT ({ROW_IS_WHOLE}) OR list_max(entry_logprobs) > 1e-5"
    where, params = _made_rows(s)
    return s.sql(
        f"SELECT r.sample_id, len(token_ids) AS tokens, len(token_logprobs) AS scored FROM {RESPONSES} r "
        f"JOIN (FROM {s.asset} WHERE {where}) t USING (sample_id) WHERE {wrong} ORDER BY r.sample_id",
        s.slice_name,
        *params,
    )


def mass_not_one(s: Subject) -> pl.DataFrame:
    """Positions of the first MASS_SAMPLE responses whose stored probabilities do not sum to 1."""
    where, params = _made_rows(s)
    return s.sql(
        f"WITH t AS (FROM teacher_logits SEMI JOIN {RESPONSES} USING (sample_id) WHERE {where} "
        f"ORDER BY sample_id LIMIT {MASS_SAMPLE}), "
        "top AS (SELECT sample_id, position, sum(exp(logprob)) AS mass FROM teacher_entries "
        f"WHERE is_head AND {where} AND sample_id IN (SELECT sample_id FROM t) GROUP BY ALL), "
        "tail AS (SELECT sample_id, unnest(range(len(tail_logmass))) AS position, unnest(tail_logmass) AS logmass "
        "FROM t) "
        "SELECT sample_id, position, coalesce(mass, 0) + exp(logmass) AS total FROM tail LEFT JOIN top "
        "USING (sample_id, position) WHERE NOT abs(total - 1) <= 1e-3 ORDER BY ALL",
        s.slice_name,
        *params,
    )


def _made_rows(s: Subject) -> tuple[str, list[str]]:
    """SQL condition for the rows of the model and settings that the partition was made with, and its parameters, $2 and
    $3. Raises ValueError for an asset that no model scores."""
    model, settings_id = find(SCORED_BY, s.asset, "asset that a model scores")
    made = s.made_with()
    return "model_id = $2 AND settings_id = $3", [made[model], made[settings_id]]


def drifted(s: Subject) -> pl.DataFrame:
    """Responses with a token past `drift.BOUND`, when more than `drift.MAX_SHARE` of all compared tokens are."""
    responses = drift.by_response(s.lake, s.require_slice())
    too_many = int(responses["past_bound"].sum()) > drift.MAX_SHARE * int(responses["tokens"].sum())
    return responses.filter(too_many & (pl.col("past_bound") > 0))
