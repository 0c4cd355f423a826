"""vLLM servers that misbehave: what may pass is tried again, the rest is a clear error, and nothing wrong is stored.

The servers are fakes (fake_vllm.py); tests/test_real_vllm.py runs the real one.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import polars as pl
import pytest
import tenacity
from fake_vllm import FAULTS, FakeVllm, response_of
from test_processes import alive
from test_sampling import add_queries

from nbg_core.base import ids
from nbg_core.config import identity
from nbg_core.lake.lake import Lake
from nbg_core.lineage.run import Run
from nbg_core.sampling import stage as sampling_stage
from nbg_core.vllm import client, server
from nbg_core.vllm.client import ServerFailed

PROMPTS = ["one", "two", "three", "four"]
N = 3
"""Responses per query."""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(client, "PAUSE", tenacity.wait_fixed(0.01))
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.0)


@pytest.fixture
def start(tiny_models):
    """`start(**how)`: a fake server of the tiny student."""
    started = []

    def start(model: str | None = None, **how) -> FakeVllm:
        started.append(FakeVllm(model or ids.model_id(tiny_models.student), **how))
        return started[-1]

    yield start
    for fake in started:
        fake.stop()


@pytest.fixture
def open_run(make_profile):
    def open_run(*fakes: FakeVllm, **vllm) -> Run:
        profile = make_profile(
            sampling={"backend": "vllm", "n_student": N, "max_tokens": 8, "chunk_queries": 2},
            vllm={"addresses": [f.url for f in fakes], "timeout_s": 1.0, **vllm},
        )
        run = Run(profile, Lake.of(profile), log=lambda line: None)
        if run.lake.sql("SELECT count(*) FROM queries").item() == 0:
            add_queries(run, PROMPTS)
        return run

    return open_run


def stored(run: Run) -> pl.DataFrame:
    return run.lake.sql("SELECT * FROM samples ORDER BY sample_id")


def all_right(rows: pl.DataFrame) -> bool:
    return all(
        r["token_ids"] == response_of(r["seed"]) and r["logprobs"] == [-0.25] * len(r["token_ids"])
        and r["finish_reason"] == "stop" and len(r["text"]) == len(r["token_ids"]) - 1
        for r in rows.iter_rows(named=True)
    )  # fmt: skip


@pytest.mark.parametrize("fault", [*FAULTS, "500", "429", "hang", "no choice", "no JSON"])
def test_what_may_pass_is_tried_again(start, open_run, fault):
    fake = start()
    fake.fault = lambda body, attempt: fault if attempt == 1 and body["seed"] % 2 else None
    run = open_run(fake)
    assert sampling_stage.materialise(run, "a").new_rows == len(PROMPTS) * N
    assert all_right(stored(run)) and stored(run)["sample_id"].n_unique() == len(PROMPTS) * N
    assert {n for (_, seed), n in fake.asked.items()} == {1, 2}


@pytest.mark.parametrize(
    ("fault", "message"),
    [("500", "status 500: .*EngineCore"), ("nan", "log-probs that are not numbers"), ("hang", "nothing within 0.2 s"),
     ("too few tokens", "tokens of at most 8, finish reason 'stop', end tokens at"), ("no choice", "0 choices"),
     ("cut", "tokens of at most 8, finish reason 'length'")],
)  # fmt: skip
def test_what_does_not_pass_is_an_error_and_what_was_finished_is_kept(start, open_run, fault, message):
    fake = start()
    run = open_run(fake, timeout_s=0.2, max_in_flight=2)
    queries = run.lake.sql("SELECT query_id FROM queries ORDER BY query_id")["query_id"]
    policy, sampling = run.policy.model_id, identity.sampling_id(run.profile)
    bad = ids.seed_from(0, ids.sample_id(queries[2], policy, sampling, 1))  # in the second chunk
    fake.fault = lambda body, attempt: fault if body["seed"] == bad else None
    with pytest.raises(ServerFailed, match=f"no usable answer from {fake.url} in [35] attempts; the last: .*{message}"):
        sampling_stage.materialise(run, "a")
    kept = stored(run)
    assert all_right(kept) and bad not in kept["seed"].to_list() and 2 * N < kept.height < len(PROMPTS) * N
    fake.fault, before = lambda body, attempt: None, fake.asked.copy()
    assert sampling_stage.materialise(run, "a").new_rows == len(PROMPTS) * N - kept.height
    assert all_right(stored(run))
    asked_again = {seed for _, seed in fake.asked - before}
    assert not asked_again & set(kept["seed"])


def test_a_refused_request_is_an_error_at_once(start, open_run):
    fake = start()
    fake.fault = lambda body, attempt: "400"
    run = open_run(fake)
    with pytest.raises(ServerFailed, match="refuses a request with status 400: .*max_tokens is too large"):
        sampling_stage.materialise(run, "a")
    assert set(fake.asked.values()) == {1} and stored(run).is_empty()


@pytest.mark.parametrize(
    ("how", "message"),
    [({"model": "other"}, "no server of vllm.addresses serves the model .* serves other; .*--served-model-name"),
     ({"version": "0.9.1"}, "is vLLM 0.9.1, the profile says vllm.version 0.32.0"),
     ({"shift": 1}, "has another tokenizer than the model .*: 'Hello, world!' is"),
     ({"raw": False}, "log-probs that change with the temperature .*--logprobs-mode raw_logprobs")],
)  # fmt: skip
def test_a_wrong_server_is_refused_before_the_first_token(start, open_run, how, message):
    fake = start(**how)
    run = open_run(fake)
    with pytest.raises(ServerFailed, match=message):
        sampling_stage.materialise(run, "a")
    assert not fake.asked and stored(run).is_empty()


def test_an_answer_of_another_model_ends_it(start, open_run):
    fake = start()
    fake.fault = lambda body, attempt: "another model" if len(fake.asked) > 3 else None
    run = open_run(fake, max_in_flight=1)
    with pytest.raises(ServerFailed, match="answered as the model other, not"):
        sampling_stage.materialise(run, "a")
    assert stored(run).height == 3 and all_right(stored(run))


def test_a_server_that_is_restarted_is_waited_for(start, open_run, monkeypatch):
    monkeypatch.setattr(client, "RETRY_SECONDS", 60.0)
    fake = start()
    fake.fault = lambda body, attempt: "500" if attempt <= client.MAX_WRONG_ANSWERS else None
    run = open_run(fake)
    assert sampling_stage.materialise(run, "a").new_rows == len(PROMPTS) * N
    assert max(fake.asked.values()) > client.MAX_WRONG_ANSWERS


def test_wrong_answers_are_counted_apart_from_none(start, open_run, monkeypatch):
    monkeypatch.setattr(client, "RETRY_SECONDS", 60.0)
    fake = start()
    fake.fault = lambda body, attempt: (
        "500" if attempt <= 6 else "nan" if attempt <= 6 + client.MAX_WRONG_ANSWERS - 1 else None
    )
    assert sampling_stage.materialise(open_run(fake), "a").new_rows == len(PROMPTS) * N


def test_an_address_that_does_not_answer_is_left_out(start, open_run):
    fake, said = start(), []
    run = open_run(fake, addresses=["http://127.0.0.1:9", fake.url])
    run.log = said.append
    assert sampling_stage.materialise(run, "a").new_rows == len(PROMPTS) * N
    assert any("left out: http://127.0.0.1:9/v1/models does not answer" in line for line in said)


def test_a_server_that_hangs_is_left_alone_for_a_while(start, open_run):
    one, two = start(), start()
    one.fault = lambda body, attempt: "hang"
    run = open_run(one, two, max_in_flight=2, timeout_s=0.5)
    assert sampling_stage.materialise(run, "a").new_rows == len(PROMPTS) * N
    assert all_right(stored(run)) and len(one.asked) <= 2  # those in flight at first


def test_tokens_that_the_tokenizer_does_not_have_are_never_asked_for(start, open_run, monkeypatch):
    monkeypatch.setattr("nbg_core.sampling.vllm_sampler.output_width", lambda *_, **kw: 262)
    fake, bodies = start(), []
    fake.fault = lambda body, attempt: bodies.append(body)
    sampling_stage.materialise(open_run(fake), "a")
    assert all(b["logit_bias"] == {"260": -100.0, "261": -100.0} for b in bodies)


def test_what_our_server_takes_bounds_a_query(open_run):
    run = open_run(max_model_len=10)
    with pytest.raises(ValueError, match="that exceeds the 10 tokens that"):
        sampling_stage._draw(run, None, run.policy.path, [("q", [{"role": "user", "content": "one"}], [])], None, None)


def test_no_server_at_an_address_is_said(start, open_run):
    run = open_run(start(), addresses=["http://127.0.0.1:9"])
    with pytest.raises(ServerFailed, match="127.0.0.1:9/v1/models does not answer as a vLLM server.*check vllm.addr"):
        sampling_stage.materialise(run, "a")


def test_a_server_that_dies_midway_is_an_error_and_a_rerun_does_the_rest(start, open_run):
    fake = start()
    fake.fault = lambda body, attempt: "die" if len(fake.asked) > 8 else None
    with pytest.raises(ServerFailed, match=f"no usable answer from {fake.url} in 3 attempts"):
        sampling_stage.materialise(open_run(fake, max_in_flight=2), "a")
    fresh = start()
    run = open_run(fresh)
    kept = stored(run)
    assert all_right(kept) and kept.height >= 2 * N
    assert sampling_stage.materialise(run, "a").new_rows == len(PROMPTS) * N - kept.height
    assert not {seed for _, seed in fresh.asked} & set(kept["seed"])


def test_the_servers_that_are_left_take_over(start, open_run):
    one, two, other = start(), start(), start(model="another model")
    one.fault = lambda body, attempt: "die" if len(one.asked) > 2 else None
    run = open_run(one, two, other)
    assert sampling_stage.materialise(run, "a").new_rows == len(PROMPTS) * N
    assert all_right(stored(run)) and one.asked and two.asked and not other.asked


def test_requests_in_flight_are_bounded_and_many(start, open_run):
    fake = start()
    fake.delay = 0.05
    sampling_stage.materialise(open_run(fake, max_in_flight=4), "a")
    assert fake.most_flying == 4


def test_the_key_for_a_server_comes_from_the_environment(start, open_run, monkeypatch):
    fake = start()
    monkeypatch.setenv("VLLM_API_KEY", "sesame-open")
    sampling_stage.materialise(open_run(fake), "a")
    assert fake.keys == {"Bearer sesame-open"}


# Our own server, played by a script in place of the interpreter


@pytest.fixture
def own(open_run, tmp_path):
    def own(script: str, **vllm) -> Run:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return open_run(python=path, **vllm)

    return own


def test_a_server_that_does_not_start_shows_the_end_of_its_log(own):
    run = own("for i in $(seq 100); do echo line $i; done; echo 'ValueError: no such dtype' >&2; exit 3")
    with pytest.raises(ServerFailed, match="(?s)ended with exit code 3.*end of .*logs/local/vllm-.*no such dtype") as e:
        sampling_stage.materialise(run, "a")
    assert "line 99" in str(e.value) and "line 9\n" not in str(e.value)


def test_a_server_that_never_answers_is_ended_with_its_children(own, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.5)
    run = own(f"trap '' TERM; sleep 300 & echo $$ $! > {tmp_path}/pids; wait", start_timeout_s=1.0)
    with pytest.raises(ServerFailed, match="did not answer within 1 s; raise vllm.start_timeout_s"):
        sampling_stage.materialise(run, "a")
    assert alive([int(p) for p in (tmp_path / "pids").read_text().split()]) == []


def test_what_a_killed_server_leaves_behind_is_ended(own, tmp_path, monkeypatch):
    monkeypatch.setattr(server.Server, "_answers", lambda self: (tmp_path / "pids").exists())
    run = own(f"sleep 300 & echo $$ $! > {tmp_path}/pids.new; mv {tmp_path}/pids.new {tmp_path}/pids; wait")
    started = server.Server(run.profile, Path(run.policy.path), run.policy.model_id, tmp_path / "logs")
    started.wait_until_ready(run.log)
    pid, child = map(int, (tmp_path / "pids").read_text().split())
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert "ended with signal 9" in started.died() and alive([child])
    started.stop()
    assert alive([pid, child]) == []


def test_the_servers_arguments(open_run, tiny_models, monkeypatch):
    run = open_run(args=["--seed=7"])
    sampling = server.server_arguments(run.profile, tiny_models.student, "id", 0)
    scoring = server.server_arguments(run.profile, tiny_models.student, "id", 32)
    assert {"--served-model-name=id", "--max-model-len=256", "--seed=7", "--dtype=float32"} < set(sampling)
    assert {"--max-logprobs=32", "--no-enable-prefix-caching", "--max-model-len=257"} < set(scoring)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environment = server.server_environment(run.profile)
    assert "PYTHONPATH" not in environment and environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "8")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    environment = server.server_environment(run.profile)
    assert (environment["VLLM_CPU_KVCACHE_SPACE"], environment["HF_HUB_OFFLINE"]) == ("8", "1")


def test_where_there_is_no_vllm_the_remedy_is_said(open_run):
    with pytest.raises(FileNotFoundError, match="sampling.backend 'vllm' need .*run `make vllm`"):
        sampling_stage.materialise(open_run(python="nowhere/python"), "a")
