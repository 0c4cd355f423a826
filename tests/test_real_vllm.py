"""Real vLLM on the embedded models: as the transformers backends, within rounding; killed, it leaves nothing (4 min).

The environment is NBG_VLLM_PYTHON's, else `.venv-vllm`, which `make vllm` builds if it is not there (3 minutes more).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
from test_sampling import add_queries
from test_vllm import stored

from nbg_core.base.processes import is_alive
from nbg_core.config.profile import PROJECT_ROOT, Profile
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Record, Write
from nbg_core.lineage.run import Run
from nbg_core.modeling.scoring import response_logprobs
from nbg_core.sampling import stage as sampling_stage
from nbg_core.sampling.backends import open_sampler
from nbg_core.sampling.sampler import Decoding, SamplingRequest
from nbg_core.sampling.transformers_sampler import TransformersSampler
from nbg_core.teacher.stage import materialise
from nbg_core.teacher.store import targets
from nbg_core.vllm.client import ServerFailed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODELS = {name: PROJECT_ROOT / "data" / "models" / f"{name}{tail}" for name, tail in
          (("student", "_sft"), ("teacher", ""))}  # fmt: skip
PROMPTS = [json.loads(line)["prompt"] for line in open(PROJECT_ROOT / "data/queries/addition.jsonl")][:60]


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with vLLM."""
    if given := os.environ.get("NBG_VLLM_PYTHON"):
        return Path(given)
    python = PROJECT_ROOT / ".venv-vllm" / "bin" / "python"
    made = subprocess.run(
        ["make", "vllm", f"PYTHON={sys.executable}"], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=1200
    )
    if made.returncode and not os.environ.get("CI"):
        pytest.skip(f"pip cannot build .venv-vllm here: {made.stderr[-500:]}")
    assert made.returncode == 0, made.stderr[-2000:]
    return python


def profile_at(root: Path, python: Path, **sections) -> Profile:
    data = {
        "name": "real", "root": root, "models": MODELS, "threads": 1, "vllm": {"python": python},
        "sampling": {"backend": "vllm", "n_student": 4, "max_tokens": 32, "temperature": 0.7, "chunk_queries": 10},
        **sections,
    }  # fmt: skip
    profile = Profile.model_validate(data)
    profile.resolve(profile.paths.queries).mkdir(parents=True, exist_ok=True)
    return profile


def below(pid: int | None = None) -> list[psutil.Process]:
    """What runs of vLLM below a process, or this one: others on this machine may have servers too."""
    found = psutil.Process(pid).children(recursive=True)
    return [p for p in living(found) if re.search(r"vllm\.entrypoints|VLLM::", " ".join(p.cmdline()))]


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if is_alive(p)]


@pytest.fixture(scope="module")
def served(python, tmp_path_factory):
    """A run, and a sampler of the embedded student behind a real server."""
    profile = profile_at(tmp_path_factory.mktemp("served"), python)
    run = Run(profile, Lake.of(profile))
    with open_sampler(run, run.policy.path, 64) as sampler:
        processes = below()
        assert len(processes) > 1
        yield run, sampler
    assert living(processes) == []


def ask(sampler, text: str, seeds) -> SamplingRequest:
    return SamplingRequest(sampler.encode([{"role": "user", "content": text}]), list(seeds))


def test_greedy_responses_are_those_of_the_transformers_sampler(served):
    run, sampler = served
    greedy = Decoding(0.0, 1.0, 32)
    requests = [ask(sampler, p, [0]) for p in PROMPTS]
    theirs = sampler.sample(requests, greedy)
    ours = TransformersSampler(run.profile, run.policy.path, 64).sample(requests, greedy)
    for (a,), (b,) in zip(theirs, ours, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_sampled_logprobs_are_the_references(served):
    run, sampler = served
    requests = [ask(sampler, p, [1, 2]) for p in PROMPTS[:20]]
    responses = sampler.sample(requests, Decoding(0.7, 0.9, 3))
    assert {r.finish_reason for row in responses for r in row} == {"stop", "length"}
    rows = pl.DataFrame([
        {"sample_id": f"{i:03}-{j}", "prompt_token_ids": request.prompt_token_ids, "token_ids": r.token_ids,
         "logprobs": r.logprobs}
        for i, (request, row) in enumerate(zip(requests, responses, strict=True)) for j, r in enumerate(row)
    ])  # fmt: skip
    scored = pl.concat(response_logprobs(run, run.policy.path, rows, "reference")).join(rows, on="sample_id")
    assert scored.height == 40
    for row in scored.iter_rows(named=True):
        assert row["logprobs"] == pytest.approx(row["token_logprobs"], abs=1e-3)


def test_a_seed_decides_its_response(served):
    _, sampler = served
    how = Decoding(1.0, 1.0, 32)
    together = sampler.sample([ask(sampler, p, range(8)) for p in PROMPTS[:8]], how)
    assert len({tuple(r.token_ids) for r in together[0]}) > 1
    for prompt, expected in zip(PROMPTS[:4], together, strict=False):
        ((alone,),) = sampler.sample([ask(sampler, prompt, [5])], how)
        assert alone.token_ids == expected[5].token_ids


def test_seeded_prompts_of_more_tokens_than_are_computed_at_once(served):
    """Regression: on a CPU the server died of them."""
    _, sampler = served
    asked = [ask(sampler, f"{i:03}" * 66, [i]) for i in range(48)]
    assert sum(len(r.prompt_token_ids) for r in asked) > 2 * 4096
    assert all(answers[0].token_ids for answers in sampler.sample(asked, Decoding(1.0, 1.0, 4)))


def test_teacher_rows_agree_with_the_transformers_engines(python, tmp_path):
    profile = profile_at(
        tmp_path, python, training={"loss": {"estimator": "bucket"}},
        teacher={"engine": "vllm", "k_head": 32, "m_tail": 0, "min_weight": 0, "epsilon": 0, "logprob_bits": 23},
    )  # fmt: skip
    run = Run(profile, Lake.of(profile), log=lambda line: None)
    (profile.resolve(profile.paths.queries) / "a.jsonl").touch()
    prompt = [257, *b"Add: 1 + 2", 259, 258]
    texts = [b"3", b"12", b"x" * 50, bytes(range(65, 91)) * 9, b""]
    samples = [
        {"slice": "a", "sample_id": f"s{i}", "query_id": "q", "source": "student", "model_id": "m", "sampling_id": "x",
         "sample_index": i, "seed": 0, "prompt_token_ids": prompt, "token_ids": [*text, 259],
         "logprobs": [-1.0] * (len(text) + 1), "finish_reason": "stop", "text": ""}
        for i, text in enumerate([*texts, b"7" * (256 - len(prompt) - 1)])  # the last fills the model's context
    ]  # fmt: skip
    pairs = [
        {"slice": "a", "pair_id": f"p{i}", "query_id": "q", "chosen_id": "s0", "rejected_id": f"s{i}",
         "chosen_score": 1.0, "rejected_score": 0.0, "margin": 1.0} for i in range(1, len(samples))
    ]  # fmt: skip
    run.lake.commit(Record("student_samples", "a", "r", "t"), [Write("samples", pl.DataFrame(samples))])
    run.commit("filtered_pairs", "a", [Write("pairs", pl.DataFrame(pairs))], data_version="v")
    by_vllm = materialise(run, "a")
    plain = profile.model_copy(update={"teacher": profile.teacher.model_copy(update={"engine": "transformers"})})
    by_transformers = materialise(Run(plain, run.lake, log=lambda line: None), "a")
    rows = run.lake.sql("SELECT * FROM teacher_logits ORDER BY sample_id")
    one, two = (rows.filter(settings_id=r.storage_id) for r in (by_vllm, by_transformers))
    assert one.height == two.height == len(samples)
    for a, b in zip(one["token_logprobs"], two["token_logprobs"], strict=True):
        assert a.to_list() == pytest.approx(b.to_list(), abs=2e-3)
    one, two = targets(one), targets(two)
    tail = [np.exp(t.tail_logmass.numpy()) for t in (one, two)]
    assert tail[0] == pytest.approx(tail[1], abs=1e-5)
    shared = 0
    for ids_1, logp_1, ids_2, logp_2 in zip(one.ids, one.logprobs, two.ids, two.logprobs, strict=True):
        both, at_1, at_2 = np.intersect1d(ids_1.numpy(), ids_2.numpy(), return_indices=True)
        assert logp_1.numpy()[at_1] == pytest.approx(logp_2.numpy()[at_2], abs=1e-3)
        shared += len(both)
    assert shared > 0.999 * one.ids.numel()


def test_a_killed_server_is_an_error_and_a_rerun_does_the_rest(python, tmp_path):
    killed, others = [], below()  # the server of the tests before may still be there
    profile = profile_at(tmp_path, python)

    def kill_at_the_first_progress(line: str) -> None:
        if "tokens/s" in line and not killed:
            killed.extend(p for p in below() if p not in others)
            (main,) = [p for p in killed if "vllm.entrypoints" in " ".join(p.cmdline())]
            main.send_signal(signal.SIGKILL)

    run = Run(profile, Lake.of(profile), log=kill_at_the_first_progress)
    add_queries(run, PROMPTS)
    with pytest.raises(ServerFailed, match="(?s)ended with signal 9.*end of .*vllm-"):
        sampling_stage.materialise(run, "a")
    assert len(killed) > 1 and living(killed) == []
    kept = stored(run)
    assert 0 < kept.height < 240
    report = sampling_stage.materialise(run, "a")
    assert (report.rows, report.new_rows) == (240, 240 - kept.height)
    rows = stored(run)
    assert rows["sample_id"].n_unique() == rows.height == 240
    same = rows.join(kept.select("sample_id", "materialisation_id"), on=["sample_id", "materialisation_id"])
    assert same.height == kept.height  # finished work is as it was
    assert [p for p in below() if p not in others] == []


def test_nothing_is_left_of_a_killed_worker(python, tmp_path):
    profile = profile_at(tmp_path, python)
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps(json.loads(profile.model_dump_json())))
    add_queries(Run(profile, Lake.of(profile)), PROMPTS)
    call = f"run_worker('student_samples', 'a', 'r', profile={str(path)!r})"
    code = f"from nbg_core.runtime.run_worker import run_worker; {call}"
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in caller.stdout:
        if "tokens/s" in line:
            break
    processes = psutil.Process(caller.pid).children(recursive=True)
    assert len(below(caller.pid)) > 1
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    deadline = time.monotonic() + 40
    while living(processes) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert living(processes) == []
