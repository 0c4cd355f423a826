"""The data contracts: one dataframely schema per lake table.

Dagster and `nbg tables` show each column's description. A primary key identifies a row across runs, so that it is
written once. Every row names the commit that wrote it in `materialisation_id`, which joins `lineage.materialisations`.
"""

from __future__ import annotations

import types
from collections.abc import Iterable

import dataframely as dy
import numpy as np
import polars as pl
from polars.datatypes import DataTypeClass

from nbg_core.base.ids import digest
from nbg_core.base.names import find, unknown
from nbg_core.lake import teacher_columns
from nbg_core.lake.teacher_columns import TEACHER_COLUMNS, TeacherColumn
from nbg_core.losses.metrics import METRICS
from nbg_core.scorers.scorers import SCORERS
from nbg_core.scorers.verifiers import VERIFIERS


def _id(what: str, **kwargs) -> dy.String:
    return dy.String(min_length=1, description=what, **kwargs)


def _one_of(names: Iterable[str]) -> str:
    *others, last = (repr(name) for name in names)
    return f"{', '.join(others)} or {last}" if others else last


def _ints(what: str) -> dy.List:
    return dy.List(dy.Int32(), description=what)


def _floats(what: str, *, allow_inf: bool = False) -> dy.List:
    return dy.List(dy.Float32(allow_inf=allow_inf), description=what)


def _schema(name: str, doc: str, base: type[dy.Schema], columns: dict[str, dy.Column]) -> type[dy.Schema]:
    """A schema whose columns are made from a declaration elsewhere."""
    return types.new_class(name, (base,), exec_body=lambda namespace: namespace.update(columns, __doc__=doc))


class Produced(dy.Schema):
    """Columns that the tables of partitioned assets share: the partition, and the commit that wrote the row."""

    slice = dy.String(min_length=1, description="partition: name of the query file")
    materialisation_id = _id("commit that wrote this row (lineage.materialisations)")


class Queries(Produced):
    """Validated, deduplicated, decontaminated queries."""

    query_id = _id("hash of the roles and texts of the messages", primary_key=True)
    split = dy.String(description="'train' or 'eval'; no training stage reads 'eval'")
    messages = dy.List(dy.Struct({"role": dy.String(), "content": dy.String()}), description="chat messages")
    prompt = dy.String(description="text of the last user message")
    answer = dy.String(nullable=True, description="reference answer")
    verifier = dy.String(nullable=True, description=_one_of(VERIFIERS))
    verifier_args = dy.String(nullable=True, description="verifier arguments, JSON")
    source_file = dy.String(description="file the row came from")
    source_line = dy.Int64(description="1-based line or row in that file")


class Samples(Produced):
    """One response of one model to one query; token ids are authoritative, text is for reading."""

    sample_id = _id("hash of (query_id, model_id, sampling_id, sample_index)", primary_key=True)
    query_id = _id("query answered")
    source = dy.String(description="'student' or 'teacher'")
    model_id = _id("hash of the weights, config and tokenizer that sampled")
    sampling_id = _id("hash of the sampling parameters, the dtype and the backend's versions")
    sample_index = dy.Int32(description="0-based index among the responses of this model to this query")
    seed = dy.Int64(description="seed that this response was drawn with")
    prompt_token_ids = _ints("prompt tokens, chat template applied")
    token_ids = _ints("response tokens, end-of-turn included")
    logprobs = _floats("sampler's log-prob of each token at temperature 1 without top-p, however it was drawn; nats")
    finish_reason = dy.String(description="'stop' or 'length' (truncated)")
    text = dy.String(description="decoded response, without special tokens")


class Scores(Produced):
    """One score of one response by one scorer."""

    sample_id = _id("response scored", primary_key=True)
    scorer = dy.String(description=_one_of(SCORERS), primary_key=True)
    scorer_id = _id("hash of what the scorer depends on", primary_key=True)
    score = dy.Float64(description="higher is better")


class Pairs(Produced):
    """A preference pair: the chosen response scores higher than the rejected by at least `preference.min_margin`."""

    pair_id = _id("hash of the two sample ids", primary_key=True)
    query_id = _id("query that both answer")
    chosen_id = _id("sample_id of the chosen response")
    rejected_id = _id("sample_id of the rejected response")
    chosen_score = dy.Float64(description="combined score of the chosen response")
    rejected_score = dy.Float64(description="combined score of the rejected response")
    margin = dy.Float64(description="chosen_score - rejected_score")


class Rejections(Produced):
    """What a stage dropped, and why."""

    stage = dy.String(description="'queries' or 'pairs'")
    query_id = dy.String(nullable=True, description="query concerned")
    chosen_id = dy.String(nullable=True, description="sample_id of the nearest candidate for chosen, if any")
    rejected_id = dy.String(nullable=True, description="sample_id of the nearest candidate for rejected, if any")
    reason = dy.String(description="short code; docs/data.md lists them")
    detail = dy.String(description="the values behind the reason")


def _teacher_column(column: TeacherColumn) -> dy.List:
    if column.dtype is np.int32:
        return _ints(column.meaning)
    if column.dtype is np.float32:
        return _floats(column.meaning, allow_inf=column.may_be_inf)
    raise unknown(f"dtype of the stored teacher column {column.name}", column.dtype.__name__, ("int32", "float32"))


TeacherLogits = _schema(
    "TeacherLogits",
    """The teacher's distribution at every position of one response, as flat lists over positions.

    Position r has `head_counts[r] + tail_counts[r]` consecutive entries. The first of them are its top entries (the
    head): the most probable tokens. The others are systematic samples of the tail, the mass outside the top entries;
    each has weight exp(tail_logmass[r]) / tail_counts[r]. The view `teacher_entries` has one row per entry.
    """,
    Produced,
    {
        "sample_id": _id("response scored", primary_key=True),
        "model_id": _id("teacher", primary_key=True),
        "settings_id": _id("hash of the storage settings, the dtype and the engine's versions", primary_key=True),
        **{column.name: _teacher_column(column) for column in TEACHER_COLUMNS},
    },
)


class ReferenceLogprobs(Produced):
    """The reference's log-probabilities of one response."""

    sample_id = _id("response scored", primary_key=True)
    model_id = _id("reference", primary_key=True)
    settings_id = _id("hash of the dtype that it was scored in", primary_key=True)
    token_logprobs = _floats("log-probability of each response token, nats")


class Checkpoints(dy.Schema):
    """A trained student."""

    checkpoint_id = _id("hash of weights, config and tokenizer: the model id", primary_key=True)
    training_id = _id("hash of initial model, teacher, settings, seed and pairs", primary_key=True)
    path = dy.String(description="folder of the weights, relative to the checkpoints folder")
    parent_model_id = _id("model that it started from, which is the reference of the DPO term")
    teacher_model_id = _id("teacher")
    input_snapshot = dy.Int64(description="lake snapshot that the training set was read at")
    n_pairs = dy.Int64(description="pairs in the training set")
    n_steps = dy.Int64(description="optimizer steps")
    settings = dy.String(description="training settings, JSON")
    created_at = dy.Datetime(time_zone="UTC", description="commit time")
    materialisation_id = _id("commit that wrote this row")


class CheckpointPairs(dy.Schema):
    """Which pair was used at which optimizer step."""

    training_id = _id("training", primary_key=True)
    checkpoint_id = _id("checkpoint")
    pair_id = _id("pair", primary_key=True)
    step = dy.Int64(description="0-based optimizer step", primary_key=True)
    epoch = dy.Int32(description="0-based pass over the pairs")
    slice = dy.String(description="partition of the pair")
    materialisation_id = _id("commit that wrote this row")


TrainingSteps = _schema(
    "TrainingSteps",
    "Metrics of one optimizer step, taken before its update, over the global batch.",
    dy.Schema,
    {
        "training_id": _id("training", primary_key=True),
        "step": dy.Int64(description="0-based optimizer step", primary_key=True),
        **{metric.name: dy.Float64(description=metric.meaning) for metric in METRICS},
        "materialisation_id": _id("commit that wrote this row"),
    },
)


class Evaluations(dy.Schema):
    """One model's answer to one held-out query."""

    model_id = _id("model evaluated", primary_key=True)
    query_id = _id("held-out query", primary_key=True)
    settings_id = _id("hash of the decoding settings, the dtype and the backend's versions", primary_key=True)
    scorer_id = _id("hash of the verifier, its arguments and the reference answer", primary_key=True)
    slice = dy.String(description="partition of the query")
    score = dy.Float64(description="verifier score in [0, 1]")
    correct = dy.Bool(description="score >= 1")
    text = dy.String(description="the answer")
    finish_reason = dy.String(description="'stop' or 'length'")
    materialisation_id = _id("commit that wrote this row")


class Promotions(dy.Schema):
    """Which model became the policy and when; the newest row is the current policy."""

    model_id = _id("model promoted")
    path = dy.String(description="folder of the weights, relative to the checkpoints folder")
    promoted_at = dy.Datetime(time_zone="UTC", description="when")
    reason = dy.String(description="who or what promoted it, on which evidence")
    materialisation_id = _id("commit that wrote this row")


class Materialisations(dy.Schema):
    """One row per commit of an asset: what ran, with which settings, from which inputs."""

    materialisation_id = _id("this commit; also in the snapshot's commit_extra_info", primary_key=True)
    asset = dy.String(description="asset or action")
    slice = dy.String(nullable=True, description="partition, null when the asset has none")
    run_id = dy.String(description="Dagster run id, or 'local'")
    status = dy.String(description="'chunk' (partial result, resumable) or 'complete'")
    n_rows = dy.Int64(description="rows written by this commit")
    data_version = dy.String(nullable=True, description="digest of the partition's content, if complete")
    settings_id = _id("hash of the settings that decide the asset's content")
    settings = dy.String(description="those settings, JSON")
    inputs = dy.String(description='JSON list of {"asset", "slice", "data_version", "snapshot"}')
    profile = dy.String(description="profile name")
    code_version = dy.String(description="CODE_VERSION of nbg_core/config/identity.py")
    created_at = dy.Datetime(time_zone="UTC", description="commit time")


TABLES: dict[str, type[dy.Schema]] = {
    "queries": Queries,
    "samples": Samples,
    "scores": Scores,
    "pairs": Pairs,
    "rejections": Rejections,
    "teacher_logits": TeacherLogits,
    "reference_logprobs": ReferenceLogprobs,
    "checkpoints": Checkpoints,
    "checkpoint_pairs": CheckpointPairs,
    "training_steps": TrainingSteps,
    "evaluations": Evaluations,
    "promotions": Promotions,
    "lineage.materialisations": Materialisations,
}

BYTE_SPLIT: dict[str, tuple[str, ...]] = {"teacher_logits": teacher_columns.BYTE_SPLIT}
"""Table -> columns that its Parquet files store byte by byte (`base.files.write_parquet`)."""

_SQL_TYPES = {"String": "VARCHAR", "Int32": "INTEGER", "Int64": "BIGINT", "Float32": "FLOAT", "Float64": "DOUBLE",
              "Boolean": "BOOLEAN", "Datetime": "TIMESTAMPTZ"}  # fmt: skip


def sql_type(dtype: pl.DataType | DataTypeClass) -> str:
    """DuckDB's name of a polars type used in a schema above."""
    if isinstance(dtype, pl.List):
        return sql_type(dtype.inner) + "[]"
    if isinstance(dtype, pl.Struct):
        return "STRUCT(" + ", ".join(f"{f.name} {sql_type(f.dtype)}" for f in dtype.fields) + ")"
    return find(_SQL_TYPES, str(dtype.base_type()), "type of a column")


def polars_schema(table: str) -> dict[str, pl.DataType]:
    """Column names and polars types of a table, in order."""
    return {name: column.dtype for name, column in TABLES[table].columns().items()}


def version() -> str:
    """Digest of all tables' columns and types."""
    return digest({t: {n: sql_type(c) for n, c in polars_schema(t).items()} for t in TABLES})


def frame(table: str, rows: list[dict]) -> pl.DataFrame:
    """A frame of `rows` (dicts) with the table's columns and types, validated against its contract.

    Raises dataframely's ValidationError, which names the rule and column that failed."""
    return validate(table, pl.DataFrame(rows, schema=polars_schema(table), orient="row"))


def validate(table: str, df: pl.DataFrame) -> pl.DataFrame:
    """`df` with the table's columns in order and cast.

    Raises ValueError for a column that the table does not declare, or that `df` lacks, and dataframely's
    ValidationError if a rule is broken."""
    declared = TABLES[table].column_names()
    if unknown := [name for name in df.columns if name not in declared]:
        raise ValueError(
            f"table {table} declares no column {', '.join(unknown)}; declare it in nbg_core/lake/tables.py (a metric "
            "of training_steps in nbg_core/losses/metrics.py), or do not write it"
        )
    if missing := [name for name in declared if name not in df.columns]:
        raise ValueError(f"the rows for table {table} lack its columns {', '.join(missing)}; add them")
    return TABLES[table].validate(df.select(declared), cast=True)
