"""Asset `queries`, tables `queries` and `rejections`: the rows of a query file, validated, deduplicated and split.

A row's own `split` decides where it goes, else its query id does, so that a query stays on its side whatever else is in
the file. Dropped rows are `rejections` of stage 'queries' with the reason 'too_long', 'duplicate', 'near_duplicate' or
'contaminated'. Rows and rejections are replaced in one commit. If the file gives the same rows as before, only the
record of the materialisation is added.

Every slice is compared with those ingested before it, so a lock lets one slice at a time be ingested on a machine.
Slices whose file is gone are ignored. Their rows stay, except that a query which the new slice has too becomes the new
slice's, so that a query file can be renamed. A held-out query of a gone slice can thus become a training query.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from nbg_core.base.files import wait_for
from nbg_core.base.ids import content_version, seed_from
from nbg_core.config.slices import check_slice_name, query_file, slice_names
from nbg_core.lake import tables
from nbg_core.lake.records import Write
from nbg_core.lineage.run import Report, Run
from nbg_core.queries.dedup import find_drops, item, text_key
from nbg_core.queries.readers import QueryFileError, QueryRow, read_rows

ASSET = "queries"

REMEDY = {
    "too_long": "shorten the prompt, or raise the limit that `detail` names",
    "duplicate": "remove the copies, or the other slice that has them",
    "near_duplicate": "raise queries.near_duplicate_jaccard",
    "contaminated": "remove one of the two rows; or, if `detail` says words in a row, raise "
    "queries.contamination_words; if it says similar, raise queries.near_duplicate_jaccard",
}
"""Reason of a rejection of stage 'queries' -> what to change."""


@dataclass(frozen=True, kw_only=True)
class QueriesReport(Report):
    n_train: int
    """Training queries."""
    n_eval: int
    """Held-out queries."""
    dropped: dict[str, int]
    """Rows of the file that were dropped, by reason."""


def materialise(run: Run, slice_name: str) -> QueriesReport:
    """Ingest a slice's file.

    Raises ValueError for a name that cannot be a slice, QueryFileError for a file with a problem or without a training
    query that can be kept."""
    check_slice_name(slice_name)
    path = _file(run, slice_name)
    settings = run.settings(ASSET, slice_name)
    rows = read_rows(path)
    if n_unverified := sum(row.verifier is None for row in rows):
        run.log(
            f"{ASSET}[{slice_name}]: {n_unverified} of {len(rows)} rows have no verifier: they are not evaluated, "
            "and give pairs only if preference.weights has a scorer that needs no verifier, such as teacher_loglik"
        )
    drops = _too_long(run, slice_name, rows)
    lock = run.profile.resolve(run.profile.paths.work) / "locks" / "queries.lock"
    with wait_for(lock, lambda: run.log(f"{ASSET}[{slice_name}]: waiting until another slice is ingested")):
        others = run.lake.sql("SELECT query_id, slice, split, messages FROM queries WHERE slice <> ?", [slice_name])
        present = pl.col("slice").is_in(slice_names(run.profile))
        kept, taken_over = _compare(run, slice_name, rows, drops, others.filter(present), others.filter(~present))
        if not any(split == "train" for _, split in kept):
            raise QueryFileError(_nothing_left(path, rows, kept, drops))
        queries = _queries_frame(slice_name, path, kept)
        rejections = _rejections_frame(slice_name, rows, drops)
        version, contents = _content(queries)
        old = run.lake.sql("SELECT * FROM queries WHERE slice = ?", [slice_name]).drop("materialisation_id")
        writes = _writes(run, slice_name, queries, rejections, old, taken_over)
        if run.settings(ASSET, slice_name) != settings:
            raise QueryFileError(f"{path} changed while it was read; materialise it again")
        commit = run.commit(ASSET, slice_name, writes, data_version=version)
    splits = Counter(split for _, split in kept)
    return QueriesReport.of(
        commit, ASSET, slice_name, version, rows=len(kept), new_rows=len(set(contents) - set(_content(old)[1])),
        n_train=splits["train"], n_eval=splits["eval"],
        dropped=dict(sorted(Counter(reason for reason, _ in drops.values()).items())),
    )  # fmt: skip


def _file(run: Run, slice_name: str) -> Path:
    """The query file of a slice. Raises QueryFileError if there are two."""
    path = query_file(run.profile, slice_name)
    other = path.with_name(f"{slice_name}.parquet")
    if path != other and other.is_file():
        raise QueryFileError(f"slice {slice_name!r} has two files, {path} and {other}; keep one or rename one")
    return path


def split_of(query_id: str, eval_fraction: float) -> str:
    """'eval' for a share `eval_fraction` of all query ids, else 'train'."""
    return "eval" if seed_from("split", query_id) / 2**63 < eval_fraction else "train"


def _too_long(run: Run, slice_name: str, rows: list[QueryRow]) -> dict[int, tuple[str, str]]:
    """Index -> (reason, detail) of the rows whose prompt, with the chat template applied, is longer than the limit."""
    from nbg_core.modeling.chat import encode_prompt
    from nbg_core.modeling.loading import context_length, load_tokenizer

    profile = run.profile
    student = profile.resolve(profile.models.student)
    tokenizer = load_tokenizer(student, trust_remote_code=profile.models.trust_remote_code)
    limit, why = profile.queries.max_prompt_tokens, "queries.max_prompt_tokens"
    response = max(profile.sampling.max_tokens, profile.evaluation.max_tokens)
    context = context_length(student)
    if context and context - response < limit:
        limit, why = context - response, f"the student's context of {context} less {response} for the response"
    if limit < 1:
        raise ValueError(f"no prompt fits: {why}; lower sampling.max_tokens and evaluation.max_tokens in the profile")
    drops = {}
    progress = run.progress(f"{ASSET}[{slice_name}]: prompts", len(rows))
    for i, row in enumerate(rows):
        n = len(encode_prompt(tokenizer, row.messages))
        if n > limit:
            drops[i] = ("too_long", f"{n} prompt tokens, limit {limit} ({why})")
        progress.advance(1)
    return drops


def _compare(
    run: Run, slice_name: str, rows: list[QueryRow], drops: dict, others: pl.DataFrame, gone: pl.DataFrame
) -> tuple[list[tuple[QueryRow, str]], list[str]]:
    """The rows to keep, each with its split, and the query ids to take over from slices whose file is gone.

    `drops` holds the rows that are too long; those that `find_drops` finds are added to it. `others` are the rows of
    other slices that have a file, `gone` those of slices that have none."""
    settings = run.profile.queries
    candidates = [i for i in range(len(rows)) if i not in drops]
    splits = {i: rows[i].split or split_of(rows[i].query_id, settings.eval_fraction) for i in candidates}
    own = [item(slice_name, splits[i], f"line {rows[i].line}", rows[i].messages) for i in candidates]
    other = [
        item(r["slice"], r["split"], f"query {r['query_id']} of slice {r['slice']!r}", r["messages"])
        for r in others.sort("slice", "query_id").iter_rows(named=True)
    ]
    found = find_drops(own, other, settings)
    drops.update({candidates[i]: drop for i, drop in found.items()})
    keys = {x.key for i, x in enumerate(own) if i not in found}
    taken_over = [r["query_id"] for r in gone.iter_rows(named=True) if text_key(r["messages"]) in keys]
    return [(rows[i], splits[i]) for i in candidates if i not in drops], sorted(taken_over)


def _queries_frame(slice_name: str, path: Path, kept: list[tuple[QueryRow, str]]) -> pl.DataFrame:
    rows = [
        {
            "slice": slice_name, "query_id": row.query_id, "split": split, "messages": row.messages,
            "prompt": row.messages[-1]["content"], "answer": row.answer, "verifier": row.verifier,
            "verifier_args": row.verifier_args, "source_file": path.name, "source_line": row.line,
        }
        for row, split in kept
    ]  # fmt: skip
    return _frame("queries", rows)


def _rejections_frame(slice_name: str, rows: list[QueryRow], drops: dict[int, tuple[str, str]]) -> pl.DataFrame:
    return _frame("rejections", [
        {
            "slice": slice_name, "stage": ASSET, "query_id": rows[i].query_id, "chosen_id": None, "rejected_id": None,
            "reason": reason, "detail": f"line {rows[i].line}: {detail}",
        }
        for i, (reason, detail) in drops.items()
    ])  # fmt: skip


def _frame(table: str, rows: list[dict]) -> pl.DataFrame:
    schema = {k: v for k, v in tables.polars_schema(table).items() if k != "materialisation_id"}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _content(queries: pl.DataFrame) -> tuple[str, list[str]]:
    """Data version of a frame of queries, and the strings that it is the hash of, one per row."""
    columns = queries.select("query_id", "split", "answer", "verifier", "verifier_args")
    contents = [json.dumps(row, ensure_ascii=False) for row in columns.iter_rows()]
    return content_version(contents), contents


def _writes(
    run: Run, slice_name: str, queries: pl.DataFrame, rejections: pl.DataFrame, old: pl.DataFrame, taken_over: list[str]
) -> list[Write]:
    """The writes of the tables whose rows of this slice differ from those in the lake; `old` are its queries there."""
    of_stage = "slice = ? AND stage = 'queries'"
    old_rejections = run.lake.sql(f"SELECT * FROM rejections WHERE {of_stage}", [slice_name]).drop("materialisation_id")
    writes = []
    if taken_over:
        where = "slice = ? OR query_id IN (SELECT unnest(?))"
        writes.append(Write("queries", queries, replace=where, params=(slice_name, taken_over)))
    elif not _same(old, queries):
        writes.append(Write("queries", queries, replace="slice = ?", params=(slice_name,)))
    if not _same(old_rejections, rejections):
        writes.append(Write("rejections", rejections, replace=of_stage, params=(slice_name,)))
    return writes


def _same(a: pl.DataFrame, b: pl.DataFrame) -> bool:
    """Whether two frames have the same rows in the columns of `b`, in any order."""
    by = [name for name, dtype in b.schema.items() if not dtype.is_nested()]
    return a.select(b.columns).sort(by, nulls_last=True).equals(b.sort(by, nulls_last=True))


def _nothing_left(path: Path, rows: list[QueryRow], kept: list, drops: dict) -> str:
    """The error message for a file without a training query: how many rows were held out or dropped for which reason,
    and what to change."""
    counts = Counter(reason for reason, _ in drops.values())
    held_out = f"{len(kept)} held out (lower queries.eval_fraction, or set 'split' in the rows)" if kept else ""
    dropped = [f"{n} {reason} ({REMEDY[reason]})" for reason, n in counts.most_common()]
    first = "; ".join(f"line {rows[i].line}: {detail}" for i, (_, detail) in list(drops.items())[:3])
    return (
        f"{path}: none of its {len(rows)} rows can be trained on: {', '.join(filter(None, [held_out, *dropped]))}"
        + (f". First: {first}" if first else "")
    )
