"""The benchmarks run, on shapes of seconds, and what they say of this project is in the right order of size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from nbg_core.config.profile import PROJECT_ROOT

BENCHMARKS = PROJECT_ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_loader():
    command = [sys.executable, str(BENCHMARKS / "loader.py"), "--sizes", "200", "200000", "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = (json.loads(line.replace("'", '"')) for line in done.stdout.splitlines()[-2:])
    assert (few["pairs"], many["pairs"]) == (200, 200_000) and few["read_tokens_per_s"] > 0
    assert many["write_peak_mb"] - few["write_peak_mb"] < 120, "nothing of every pair is held"
    assert many["read_peak_mb"] - few["read_peak_mb"] < 40


def test_teacher_store():
    import teacher_store

    rows = teacher_store.measure("tiny", None, lambda seed: teacher_store.heavy_tail(seed, 128, 500), 2)
    found = {r["codec"]: r for r in rows}
    assert set(found) == set(teacher_store.codecs(500))
    ours, fixed = found["project, as it comes"], found["top-64, int32 + fp16, bucket"]
    assert abs(ours["kl_error"]) < 0.1 < abs(fixed["kl_error"])
    assert 10 < ours["bytes_per_token"] < fixed["bytes_per_token"] == 384
    assert ours["decode_tokens_per_s"] > 1000 and 0 < ours["grad_cosine"] <= 1
    assert "project, as it comes" in teacher_store.section(rows)


def test_serving(tmp_path, tiny_models):
    import serving

    (tmp_path / "model").symlink_to(tiny_models.student)
    drawn = serving.sample(tmp_path, "transformers")
    assert drawn["responses_per_s"] > 0 and drawn["peak_mb"] > 50
    scored = {variant: serving.score(tmp_path, variant, "short") for variant in ("project", "plain")}
    assert scored["project"]["tokens"] == scored["plain"]["tokens"] > 0
    assert all(s["tokens_per_s"] > 0 for s in scored.values())


def test_gpu():
    """Without one; packages that only benchmarks have may be missing, then their variants say so."""
    import gpu

    rows = gpu.lm_head("cpu", True, 1, None) + gpu.step("cpu", True, 1, ["3B, 1 of 16k, gradient checkpointing"])
    done = {(r["part"], r["variant"]) for r in rows if "median_s" in r}
    assert {("head", "D, a pair of 8,192 (recompute)"), ("step", "D"), ("step", "D compiled")} <= done
    assert all("No module named" in r["error"] for r in rows if "median_s" not in r)
    assert gpu.section(rows).count("| D compiled |") == 1


def test_train_step():
    import train_step

    threads = torch.get_num_threads()
    rows = train_step.measure(train_step.quick(train_step.CASES[0]), 1)
    torch.set_num_threads(threads)
    found = {r["variant"]: r for r in rows}
    assert {"A", "A0", "B", "C", "D"} <= {n for n, r in found.items() if r["median_s"]}
    assert found["D"]["peak_bytes"] < found["A"]["peak_bytes"] and 0 < found["D"]["operators"]["products"] < 1
    assert found["D lean"]["peak_bytes"] < found["D"]["peak_bytes"]
    assert "| D |" in train_step.tables(rows)
