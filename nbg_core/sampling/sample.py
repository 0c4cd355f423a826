"""`student_samples`: responses of the current policy (and, as a setting, the teacher) to the training queries.

Only responses whose id is not in the lake are drawn; each chunk of queries is committed when it is done. A chunk is
always the same queries in the same order, so a run that was cut off continues with the batches it would have had.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from nbg_core import ids
from nbg_core.lake import Write
from nbg_core.models import check_same_tokenizer, context_length
from nbg_core.run import Run
from nbg_core.sampling.sampler import Decoding, Request, Sampler

ASSET = "student_samples"


COMMIT_SECONDS = 30.0
"""Finished responses wait this long for their commit at most, where a chunk takes longer."""


@contextmanager
def open_sampler(run: Run, path: Path, batch_size: int) -> Iterator[Sampler]:
    """The profile's sampler for the model at `path`."""
    profile = run.profile
    if profile.sampling.backend == "vllm":
        from nbg_core.sampling.vllm_sampler import VllmSampler
        from nbg_core.vllm.server import served

        with served(run, path) as client:
            yield VllmSampler(client, path, trust_remote_code=profile.models.trust_remote_code)
    else:
        from nbg_core.sampling.transformers_sampler import TransformersSampler

        yield TransformersSampler(profile, path, batch_size)


def materialise(run: Run, slice: str) -> dict:
    """Draw the responses of a slice that are missing.

    Raises ValueError when prompt and response do not fit the model's context, or the tokenizers differ."""
    s, sampling = run.profile.sampling, run.profile.sampling_id()
    trust = run.profile.models.trust_remote_code
    snapshot, inputs = run.read("queries", slice=slice)
    queries = run.lake.sql(
        "SELECT query_id, messages FROM queries WHERE slice = ? AND split = 'train' ORDER BY query_id",
        [slice],
        snapshot=snapshot,
    )
    models = [("student", run.policy.path, run.policy.model_id, s.n_student)]
    path = run.profile.resolve(run.profile.models.teacher)
    check_same_tokenizer(run.policy.path, path, trust_remote_code=trust)  # before work that the teacher could not score
    if s.n_teacher:
        models.append(("teacher", path, ids.model_id(path), s.n_teacher))
    new_rows, expected = 0, []
    for source, path, model, n in models:
        wanted = {q: [ids.sample_id(q, model, sampling, i) for i in range(n)] for q in queries["query_id"].to_list()}
        expected += [sample for row in wanted.values() for sample in row]
        new_rows += _draw_missing(run, slice, queries, wanted, source, path, model, inputs)
    version = ids.content_version(expected)
    commit = run.commit(ASSET, slice, inputs=inputs, data_version=version)
    return {
        "asset": ASSET, "slice": slice, "snapshot": commit.snapshot, "data_version": version, "rows": len(expected),
        "new_rows": new_rows, "policy_model_id": run.policy.model_id, "queries": queries.height,
    }  # fmt: skip


def _draw_missing(run: Run, slice: str, queries: pl.DataFrame, wanted: dict, source: str, path, model, inputs) -> int:
    s, sampling = run.profile.sampling, run.profile.sampling_id()
    present = run.lake.sql(
        "SELECT sample_id FROM samples WHERE model_id = ? AND sampling_id = ? "
        "AND query_id IN (SELECT query_id FROM queries WHERE slice = ?)",
        [model, sampling, slice],
    )["sample_id"]
    present = set(present)
    n_all = sum(len(v) for v in wanted.values())
    n_missing = sum(i not in present for v in wanted.values() for i in v)
    what = f"{ASSET}[{slice}]: {source}"
    run.log(f"{what}: {n_all - n_missing} of {n_all} responses already drawn")
    if not n_missing:
        return 0
    with open_sampler(run, path, s.batch_size) as sampler:
        return _draw(run, slice, queries, wanted, present, sampler, n_missing, source, path, model, inputs)


def _draw(run: Run, slice, queries, wanted, present, sampler: Sampler, n_missing, source, path, model, inputs) -> int:
    s, sampling = run.profile.sampling, run.profile.sampling_id()
    decoding = Decoding(s.temperature, s.top_p, s.max_tokens)
    limit = context_length(path)
    progress = run.progress(f"{ASSET}[{slice}]: {source}", n_missing)
    new_rows = tokens = 0
    start = committed = time.monotonic()

    def commit(records: list[dict]) -> int:
        writes = [Write("samples", pl.DataFrame(records))]
        return run.commit(ASSET, slice, writes, inputs=inputs).n_rows if records else 0

    for chunk in queries.iter_slices(s.chunk_queries):
        rows, requests = [], []
        for query in chunk.iter_rows(named=True):
            missing = [(i, sid) for i, sid in enumerate(wanted[query["query_id"]]) if sid not in present]
            if not missing:
                continue
            prompt = sampler.encode(query["messages"])
            if limit and len(prompt) + s.max_tokens > limit:
                raise ValueError(
                    f"query {query['query_id']} has {len(prompt)} prompt tokens; with sampling.max_tokens "
                    f"{s.max_tokens} that passes the context of {limit} tokens of {path}; lower one of them"
                )
            seeds = [ids.seed_from(s.seed, sid) for _, sid in missing]
            requests.append(Request(prompt, seeds))
            rows.append((query["query_id"], missing, prompt, seeds))
        if not requests:
            continue
        records = []
        try:
            for i, j, r in sampler.stream(requests, decoding):
                query_id, missing, prompt, seeds = rows[i]
                index, sid = missing[j]
                records.append({
                    "slice": slice, "sample_id": sid, "query_id": query_id, "source": source, "model_id": model,
                    "sampling_id": sampling, "sample_index": index, "seed": seeds[j], "prompt_token_ids": prompt,
                    "token_ids": r.token_ids, "logprobs": r.logprobs, "finish_reason": r.finish_reason,
                    "text": sampler.decode(r.token_ids),
                })  # fmt: skip
                tokens += len(r.token_ids)
                now = time.monotonic()
                if now - committed > COMMIT_SECONDS:
                    done, records = records, []
                    new_rows += commit(done)
                    committed = now
                progress.advance(1, f"{tokens / max(now - start, 1e-9):.0f} tokens/s")
        finally:  # also when a server died: what is finished is kept
            new_rows += commit(records)
            committed = time.monotonic()
    return new_rows
