"""Asset `student_samples`, table `samples`: responses of the policy to training queries, and of the teacher if
`sampling.n_teacher` says so.

Only responses whose id is not in the lake are drawn, in the order of query ids. They are committed whenever a chunk of
queries is done, and every COMMIT_SECONDS.

The policy's chat template encodes the prompt for both, because the two responses of a pair must have the same prompt
tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from nbg_core.base import ids
from nbg_core.base.progress import CommitBuffer, Progress
from nbg_core.config import identity
from nbg_core.lake.records import Input, Write
from nbg_core.lineage.run import Report, Run
from nbg_core.modeling.chat import encode_prompt
from nbg_core.modeling.loading import check_same_tokenizer, context_length, load_tokenizer
from nbg_core.sampling.backends import open_sampler
from nbg_core.sampling.sampler import Decoding, Sampler, SamplingRequest

ASSET = "student_samples"


@dataclass(frozen=True, kw_only=True)
class SamplesReport(Report):
    policy_model_id: str
    """The policy that sampled."""
    queries: int
    """Training queries of the slice."""


def materialise(run: Run, slice_name: str) -> SamplesReport:
    """Draw the responses of a slice that are missing.

    Raises ValueError if a prompt with its response does not fit the model's context, or if the tokenizers differ."""
    sampling, models = run.profile.sampling, run.profile.models
    snapshot, inputs = run.read_upstream(ASSET, slice_name)
    queries = run.lake.sql(
        "SELECT query_id, messages FROM queries WHERE slice = ? AND split = 'train' ORDER BY query_id",
        [slice_name],
        snapshot=snapshot,
    )
    teacher_path = run.profile.resolve(models.teacher)
    # Checked before any sampling, since a teacher with another tokenizer could not score the student's responses.
    check_same_tokenizer(run.policy.path, teacher_path, trust_remote_code=models.trust_remote_code)
    sources = [("student", run.policy.path, run.policy.model_id, sampling.n_student)]
    if sampling.n_teacher:
        sources.append(("teacher", teacher_path, ids.model_id(teacher_path), sampling.n_teacher))
    sampling_id = identity.sampling_id(run.profile)
    new_rows, expected = 0, []
    for source, path, model_id, n in sources:
        wanted = {
            query_id: [ids.sample_id(query_id, model_id, sampling_id, index) for index in range(n)]
            for query_id in queries["query_id"].to_list()
        }
        expected += [sample_id for sample_ids in wanted.values() for sample_id in sample_ids]
        new_rows += _draw_missing(run, slice_name, queries, wanted, source, path, model_id, inputs)
    version = ids.content_version(expected)
    commit = run.commit(ASSET, slice_name, inputs=inputs, data_version=version)
    return SamplesReport.of(
        commit, ASSET, slice_name, version, rows=len(expected), new_rows=new_rows, policy_model_id=run.policy.model_id,
        queries=queries.height,
    )  # fmt: skip


def _draw_missing(
    run: Run,
    slice_name: str,
    queries: pl.DataFrame,
    wanted: dict[str, list[str]],
    source: str,
    path: Path,
    model_id: str,
    inputs: Sequence[Input],
) -> int:
    """Draw and commit the responses of a model that the lake does not have yet, and return their number.

    `wanted` is query id -> sample ids by index; `source` is 'student' or 'teacher', `path` the model's folder."""
    sampling_id = identity.sampling_id(run.profile)
    present = set(run.lake.sql(
        "SELECT sample_id FROM samples WHERE model_id = ? AND sampling_id = ? "
        "AND query_id IN (SELECT query_id FROM queries WHERE slice = ?)",
        [model_id, sampling_id, slice_name],
    )["sample_id"])  # fmt: skip
    todo = []
    for query in queries.iter_rows(named=True):
        sample_ids = enumerate(wanted[query["query_id"]])
        if missing := [(index, sample_id) for index, sample_id in sample_ids if sample_id not in present]:
            todo.append((query["query_id"], query["messages"], missing))
    n_all, n_missing = sum(map(len, wanted.values())), sum(len(missing) for *_, missing in todo)
    run.log(f"{ASSET}[{slice_name}]: {source}: {n_all - n_missing} of {n_all} responses already drawn")
    if not todo:
        return 0
    shared = {"slice": slice_name, "source": source, "model_id": model_id, "sampling_id": sampling_id}

    def commit(records: list[dict]) -> int:
        rows = pl.DataFrame([shared | record for record in records])
        return run.commit(ASSET, slice_name, [Write("samples", rows)], inputs=inputs).n_rows

    with open_sampler(run, path, run.profile.sampling.batch_size) as sampler, CommitBuffer(commit) as buffer:
        _draw(run, sampler, path, todo, buffer, run.progress(f"{ASSET}[{slice_name}]: {source}", n_missing))
    return buffer.new_rows


def _longest(run: Run, path: Path) -> int | None:
    """Maximum length of prompt and response together, in tokens; None without a limit."""
    vllm = run.profile.vllm
    of_server = vllm.max_model_len if run.profile.sampling.backend == "vllm" and not vllm.addresses else None
    return min(filter(None, (context_length(path), of_server)), default=None)


def _draw(run: Run, sampler: Sampler, path: Path, todo: list[tuple], buffer: CommitBuffer, progress: Progress) -> None:
    """Draw the responses of `todo` and add their records to `buffer`.

    `todo` has (query_id, messages, missing) for each query; `missing` is a list of (index, sample_id).
    Raises ValueError naming the query whose prompt is too long."""
    s = run.profile.sampling
    tokenizer = load_tokenizer(run.policy.path, trust_remote_code=run.profile.models.trust_remote_code)
    decoding, limit = Decoding(s.temperature, s.top_p, s.max_tokens), _longest(run, path)
    n_tokens, start = 0, time.monotonic()
    for first in range(0, len(todo), s.chunk_queries):
        chunk = todo[first : first + s.chunk_queries]
        requests = []
        for query_id, messages, missing in chunk:
            prompt = encode_prompt(tokenizer, messages)
            if limit and len(prompt) + s.max_tokens > limit:
                raise ValueError(
                    f"query {query_id} has {len(prompt)} prompt tokens; with sampling.max_tokens "
                    f"{s.max_tokens} that exceeds the {limit} tokens that {path} takes; shorten the query, or lower "
                    "sampling.max_tokens"
                )
            requests.append(SamplingRequest(prompt, [ids.seed_from(s.seed, sample_id) for _, sample_id in missing]))
        for i, j, response in sampler.stream(requests, decoding):
            query_id, _, missing = chunk[i]
            index, sample_id = missing[j]
            buffer.add({
                "sample_id": sample_id, "query_id": query_id, "sample_index": index, "seed": requests[i].seeds[j],
                "prompt_token_ids": requests[i].prompt_token_ids, "token_ids": response.token_ids,
                "logprobs": response.logprobs, "finish_reason": response.finish_reason,
                "text": sampler.decode(response.token_ids),
            })  # fmt: skip
            n_tokens += len(response.token_ids)
            progress.advance(1, f"{n_tokens / max(time.monotonic() - start, 1e-9):.0f} tokens/s")
        buffer.flush()
