"""The worker process: killed at any moment it loses at most a chunk; and a partition has one worker at a time."""

import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import yaml
from fake_vllm import FakeVllm
from test_sampling import add_queries

from nbg_core.base.ids import pair_id
from nbg_core.config.profile import Profile
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Write
from nbg_core.lineage.run import Run
from nbg_core.runtime.worker import only_worker

PROMPTS = [f"query number {i}" for i in range(24)]


@pytest.fixture
def place(make_profile, tmp_path):
    """`place(name)`: a run on a lake of its own, and the environment a worker finds it by."""

    def make(name: str) -> tuple[Run, dict]:
        profile = make_profile(
            sampling={"n_student": 2, "max_tokens": 24, "chunk_queries": 2},
            teacher={"k_head": 8, "m_tail": 4, "chunk_samples": 2},
            lake={"catalog": f"sqlite:{name}/catalog.sqlite", "data_path": f"{name}/files"},
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(json.loads(profile.model_dump_json())))
        run = Run(profile, Lake.of(profile), log=lambda line: None)
        add_queries(run, PROMPTS)
        return run, {**os.environ, "NBG_PROFILE": str(path)}

    return make


def command(asset: str) -> list[str]:
    return [sys.executable, "-m", "nbg_core.runtime.worker", asset, "--slice", "a"]


def finish(asset: str, env: dict) -> dict:
    done = subprocess.run(command(asset), env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout[done.stdout.index("\n{") :])


def kill_after_first_chunk(asset: str, table: str, run: Run, env: dict) -> int:
    worker = subprocess.Popen(command(asset), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not run.lake.sql(f"SELECT count(*) FROM {table}").item():
        assert worker.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    return run.lake.sql(f"SELECT count(*) FROM {table}").item()


def pair_up(run: Run) -> None:
    """A pair of each query's two responses."""
    samples = run.lake.sql("SELECT query_id, list(sample_id ORDER BY sample_id) AS s FROM samples GROUP BY ALL")
    pairs = [
        {"slice": "a", "pair_id": pair_id(c, r), "query_id": q, "chosen_id": c, "rejected_id": r, "chosen_score": 1.0,
         "rejected_score": 0.0, "margin": 1.0} for q, (c, r) in samples.iter_rows()
    ]  # fmt: skip
    run.commit("filtered_pairs", "a", [Write("pairs", pl.DataFrame(pairs))], data_version="v")


@pytest.mark.slow
def test_sampling_and_scoring_survive_sigkill(place):
    run, env = place("killed")
    undisturbed, other = place("whole")
    for asset, table, total in [("student_samples", "samples", 48), ("teacher_logits", "teacher_logits", 48)]:
        kept = kill_after_first_chunk(asset, table, run, env)
        assert 0 < kept < total, "the worker was not killed midway"
        assert finish(asset, env)["new_rows"] == total - kept
        assert finish(asset, other)["new_rows"] == total
        rows = [r.lake.sql(f"SELECT * EXCLUDE materialisation_id FROM {table} ORDER BY sample_id")
                for r in (run, undisturbed)]  # fmt: skip
        assert rows[0].equals(rows[1])
        orphans = run.lake.sql(f"FROM {table} ANTI JOIN lineage.materialisations USING (materialisation_id)")
        assert orphans.is_empty()
        if asset == "student_samples":
            pair_up(run)
            pair_up(undisturbed)


def test_a_second_worker_of_a_partition_is_told_who_is_at_it(place):
    run, env = place("busy")
    with only_worker(run.profile, "student_samples", "a", "run-1"):
        second = subprocess.run(command("student_samples"), env=env, capture_output=True, text=True, timeout=60)
        for other in (("student_samples", "b"), ("queries", "a")):
            with only_worker(run.profile, *other, "run-2"):
                pass  # it is free
    assert second.returncode == 1
    assert f"student_samples[a] is being materialised by run run-1, process {os.getpid()}" in second.stdout
    assert run.lake.sql("SELECT count(*) FROM samples").item() == 0


def test_a_worker_that_is_terminated_commits_what_is_finished(place):
    run, env = place("ended")
    fake = FakeVllm(run.policy.model_id)
    fake.delay = 0.05
    data = json.loads(run.profile.model_dump_json())
    data["sampling"] |= {"backend": "vllm", "chunk_queries": 24}
    data["vllm"] |= {"addresses": [fake.url], "max_in_flight": 1}
    path = run.profile.root / "vllm.yaml"
    path.write_text(yaml.safe_dump(data))
    run = Run(Profile.model_validate(data), run.lake, log=lambda line: None)
    env |= {"NBG_PROFILE": str(path)}
    worker = subprocess.Popen(command("student_samples"), env=env, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while len(fake.asked) < 10:
        assert worker.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    worker.terminate()
    worker.communicate(timeout=30)
    assert worker.returncode == 128 + signal.SIGTERM
    kept = run.lake.sql("SELECT count(*) FROM samples").item()
    assert len(fake.asked) - 1 <= kept < 48  # but for the one in flight
    before = len(fake.asked)
    fake.delay = 0
    assert finish("student_samples", env)["new_rows"] == 48 - kept == len(fake.asked) - kept
    assert len(fake.asked) - before in (48 - kept, 48 - kept - 1)
    fake.stop()
