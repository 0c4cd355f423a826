"""`student_samples`: responses of the current policy (and, as a setting, the teacher) to the training queries.

Only responses whose id is not in the lake are drawn, in the order of query ids; a chunk of queries is committed when it
is done, and every COMMIT_SECONDS.

Teacher and student get one prompt: the policy's chat template encodes it for both, whatever the teacher's own is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from nbg_core.base import ids
from nbg_core.base.names import unknown
from nbg_core.base.progress import CommitBuffer, Progress
from nbg_core.config import identity
from nbg_core.config.profile import ENGINES
from nbg_core.lake.records import Write
from nbg_core.lineage.run import Report, Run
from nbg_core.modeling.chat import encode_prompt
from nbg_core.modeling.loading import check_same_tokenizer, context_length, load_tokenizer
from nbg_core.sampling.sampler import Decoding, Request, Sampler

ASSET = "student_samples"


@contextmanager
def open_sampler(run: Run, path: Path, batch_size: int) -> Iterator[Sampler]:
    """The profile's sampler for the model at `path`. Raises ValueError for an unknown backend."""
    profile = run.profile
    match profile.sampling.backend:
        case "transformers":
            from nbg_core.sampling.transformers_sampler import TransformersSampler

            yield TransformersSampler(profile, path, batch_size)
        case "vllm":
            from nbg_core.sampling.vllm_sampler import VllmSampler
            from nbg_core.vllm.server import served

            with served(run, path) as client:
                yield VllmSampler(client, path, trust_remote_code=profile.models.trust_remote_code)
        case _:
            raise unknown("sampling.backend", profile.sampling.backend, ENGINES)


@dataclass(frozen=True, kw_only=True)
class SamplesReport(Report):
    policy_model_id: str
    """The policy that sampled."""
    queries: int
    """Training queries of the slice."""


def materialise(run: Run, slice_name: str) -> SamplesReport:
    """Draw the responses of a slice that are missing.

    Raises ValueError when prompt and response do not fit the model's context, or the tokenizers differ."""
    s, sampling = run.profile.sampling, identity.sampling_id(run.profile)
    trust = run.profile.models.trust_remote_code
    snapshot, inputs = run.read_upstream(ASSET, slice_name)
    queries = run.lake.sql(
        "SELECT query_id, messages FROM queries WHERE slice = ? AND split = 'train' ORDER BY query_id",
        [slice_name],
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
        new_rows += _draw_missing(run, slice_name, queries, wanted, source, path, model, inputs)
    version = ids.content_version(expected)
    commit = run.commit(ASSET, slice_name, inputs=inputs, data_version=version)
    return SamplesReport.of(
        commit, ASSET, slice_name, version, rows=len(expected), new_rows=new_rows, policy_model_id=run.policy.model_id,
        queries=queries.height,
    )  # fmt: skip


def _draw_missing(
    run: Run, slice_name: str, queries: pl.DataFrame, wanted: dict, source: str, path, model, inputs
) -> int:
    s, sampling = run.profile.sampling, identity.sampling_id(run.profile)
    present = set(run.lake.sql(
        "SELECT sample_id FROM samples WHERE model_id = ? AND sampling_id = ? "
        "AND query_id IN (SELECT query_id FROM queries WHERE slice = ?)",
        [model, sampling, slice_name],
    )["sample_id"])  # fmt: skip
    todo = [
        (query["query_id"], query["messages"], missing)
        for query in queries.iter_rows(named=True)
        if (missing := [(i, sid) for i, sid in enumerate(wanted[query["query_id"]]) if sid not in present])
    ]
    n_all, n_missing = sum(map(len, wanted.values())), sum(len(missing) for *_, missing in todo)
    run.log(f"{ASSET}[{slice_name}]: {source}: {n_all - n_missing} of {n_all} responses already drawn")
    if not todo:
        return 0
    same = {"slice": slice_name, "source": source, "model_id": model, "sampling_id": sampling}

    def commit(records: list[dict]) -> int:
        rows = pl.DataFrame([same | record for record in records])
        return run.commit(ASSET, slice_name, [Write("samples", rows)], inputs=inputs).n_rows

    with open_sampler(run, path, s.batch_size) as sampler, CommitBuffer(commit) as finished:
        _draw(run, sampler, path, todo, finished, run.progress(f"{ASSET}[{slice_name}]: {source}", n_missing))
    return finished.new_rows


def _longest(run: Run, path: Path) -> int | None:
    """Tokens of prompt and response together that can be sampled; None is without limit."""
    vllm = run.profile.vllm
    of_server = vllm.max_model_len if run.profile.sampling.backend == "vllm" and not vllm.addresses else None
    return min(filter(None, (context_length(path), of_server)), default=None)


def _draw(
    run: Run, sampler: Sampler, path: Path, todo: list[tuple], finished: CommitBuffer, progress: Progress
) -> None:
    """Draw the missing (index, sample_id) of each (query_id, messages, missing) of `todo`."""
    s = run.profile.sampling
    tokenizer = load_tokenizer(run.policy.path, trust_remote_code=run.profile.models.trust_remote_code)
    decoding, limit = Decoding(s.temperature, s.top_p, s.max_tokens), _longest(run, path)
    tokens, start = 0, time.monotonic()
    for at in range(0, len(todo), s.chunk_queries):
        chunk = todo[at : at + s.chunk_queries]
        requests = []
        for query_id, messages, missing in chunk:
            prompt = encode_prompt(tokenizer, messages)
            if limit and len(prompt) + s.max_tokens > limit:
                raise ValueError(
                    f"query {query_id} has {len(prompt)} prompt tokens; with sampling.max_tokens "
                    f"{s.max_tokens} that passes the {limit} tokens that {path} takes; lower one of them"
                )
            requests.append(Request(prompt, [ids.seed_from(s.seed, sid) for _, sid in missing]))
        for i, j, r in sampler.stream(requests, decoding):
            query_id, _, missing = chunk[i]
            index, sid = missing[j]
            finished.add({
                "sample_id": sid, "query_id": query_id, "sample_index": index, "seed": requests[i].seeds[j],
                "prompt_token_ids": requests[i].prompt_token_ids, "token_ids": r.token_ids, "logprobs": r.logprobs,
                "finish_reason": r.finish_reason, "text": sampler.decode(r.token_ids),
            })  # fmt: skip
            tokens += len(r.token_ids)
            progress.advance(1, f"{tokens / max(time.monotonic() - start, 1e-9):.0f} tokens/s")
        finished.flush()
