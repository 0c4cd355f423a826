"""`student_samples`: responses of the current policy (and, as a setting, the teacher) to the training queries.

Only responses whose id is not in the lake are drawn; each chunk of queries that miss some is committed when it is
done. Chunks follow the order of query ids, so a run that was cut off continues with the batches it would have had.

Teacher and student get one prompt: the policy's chat template encodes it for both, whatever the teacher's own is.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from nbg_core import ids
from nbg_core.config import Profile
from nbg_core.lake import Write
from nbg_core.models import check_same_tokenizer, context_length, encode_prompt, load_tokenizer
from nbg_core.run import Run
from nbg_core.sampling.sampler import Decoding, Request, Sampler

ASSET = "student_samples"


def open_sampler(profile: Profile, path: Path, batch_size: int) -> Sampler:
    """The profile's sampler for the model at `path`. Raises ValueError for a backend this version does not have."""
    if profile.sampling.backend == "transformers":
        from nbg_core.sampling.transformers_sampler import TransformersSampler

        return TransformersSampler(profile, path, batch_size)
    raise ValueError(
        f"sampling.backend {profile.sampling.backend!r} is not in this version; set it to 'transformers' in the profile"
    )


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
    sampler = open_sampler(run.profile, path, s.batch_size)
    tokenizer = load_tokenizer(run.policy.path, trust_remote_code=run.profile.models.trust_remote_code)
    decoding = Decoding(s.temperature, s.top_p, s.max_tokens)
    limit = context_length(path)
    progress = run.progress(what, n_missing)
    new_rows = 0
    short = [q for q, row in wanted.items() if not present.issuperset(row)]
    for chunk in queries.filter(pl.col("query_id").is_in(short)).iter_slices(s.chunk_queries):
        rows, requests = [], []
        for query in chunk.iter_rows(named=True):
            missing = [(i, sid) for i, sid in enumerate(wanted[query["query_id"]]) if sid not in present]
            prompt = encode_prompt(tokenizer, query["messages"])
            if limit and len(prompt) + s.max_tokens > limit:
                raise ValueError(
                    f"query {query['query_id']} has {len(prompt)} prompt tokens; with sampling.max_tokens "
                    f"{s.max_tokens} that passes the context of {limit} tokens of {path}; lower one of them"
                )
            seeds = [ids.seed_from(s.seed, sid) for _, sid in missing]
            requests.append(Request(prompt, seeds))
            rows.append((query["query_id"], missing, prompt, seeds))
        records = []
        for (query_id, missing, prompt, seeds), responses in zip(rows, sampler.sample(requests, decoding), strict=True):
            for (index, sid), seed, r in zip(missing, seeds, responses, strict=True):
                records.append({
                    "slice": slice, "sample_id": sid, "query_id": query_id, "source": source, "model_id": model,
                    "sampling_id": sampling, "sample_index": index, "seed": seed, "prompt_token_ids": prompt,
                    "token_ids": r.token_ids, "logprobs": r.logprobs, "finish_reason": r.finish_reason,
                    "text": sampler.decode(r.token_ids),
                })  # fmt: skip
        new_rows += run.commit(ASSET, slice, [Write("samples", pl.DataFrame(records))], inputs=inputs).n_rows
        progress.advance(len(records), f"{sum(len(r['token_ids']) for r in records)} tokens in this chunk")
    return new_rows
