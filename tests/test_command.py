"""`nbg run` on the embedded models as a user has it: killed, run again, run once more, and from scratch elsewhere.

Two whole pipelines on a few queries, through the real command, workers and training (90 s)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from nbg_core.assets import ASSETS, PARTITIONED, UNPARTITIONED
from nbg_core.config.profile import PROJECT_ROOT

pytestmark = pytest.mark.slow
QUERIES = 32


def project(root: Path) -> dict[str, str]:
    """The environment of a project below `root`: the embedded profile with fewer queries, samples and steps."""
    (root / "data" / "queries").mkdir(parents=True)
    lines = (PROJECT_ROOT / "data" / "queries" / "addition.jsonl").read_text().splitlines(keepends=True)
    (root / "data" / "queries" / "addition.jsonl").write_text("".join(lines[:QUERIES]))
    profile = yaml.safe_load((PROJECT_ROOT / "profiles" / "embedded.yaml").read_text())
    profile["models"] |= {name: str(PROJECT_ROOT / profile["models"][name]) for name in ("student", "teacher")}
    profile["sampling"]["n_student"] = 4
    profile["training"] |= {
        "epochs": 40,
        "global_batch_pairs": 4,
        "save_every": 10,
    }  # seconds: long enough to be killed
    path = root / "embedded.yaml"
    path.write_text(yaml.safe_dump(profile))
    return {**os.environ, "NBG_ROOT": str(root), "NBG_PROFILE": str(path), "DAGSTER_HOME": str(root / "home")}


def start(env: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "nbg_assets.cli", "run"]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(env: dict[str, str]) -> str:
    process = start(env)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def kill_in_training(env: dict[str, str]) -> None:
    """SIGKILL for the command, once training has saved a state; returns when all that it started is gone."""
    process = start(env)
    seen, family = "", []
    for line in process.stdout:
        seen += line
        if re.match(r"student_checkpoint: [1-9]\d*/", line) and list(Path(env["NBG_ROOT"]).rglob("step-*.json")):
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            break
    assert family, seen
    process.wait()
    process.stdout.close()
    _, left = psutil.wait_procs(family, timeout=20)
    assert not left, left


def checkpoint(env: dict[str, str]) -> list[str]:
    query = "SELECT checkpoint_id FROM checkpoints ORDER BY ALL"
    command = [sys.executable, "-m", "nbg_assets.cli", "sql", query, "--format", "csv"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()[1:]


def test_a_killed_command_goes_on_a_second_one_does_nothing_and_another_project_gets_the_same(tmp_path):
    env = project(tmp_path / "one")
    kill_in_training(env)
    resumed = finish(env)
    assert f"{len(PARTITIONED)} already up to date" in resumed and f"{len(UNPARTITIONED)} materialised" in resumed
    assert re.search(r"continuing after step [1-9]", resumed)
    again = finish(env)
    assert f"0 materialised, {len(ASSETS)} already up to date, 0 failed" in again and "\nrun " not in again
    other = project(tmp_path / "two")
    whole = finish(other)
    assert f"{len(ASSETS)} materialised, 0 already up to date, 0 failed" in whole
    warned = [line for line in whole.splitlines() if line.startswith("check ")]
    assert [line for line in warned if "better_than_before" not in line] == []
    assert (f"checks that did not pass (above): {len(warned)}" in whole) == bool(warned)
    (made,) = checkpoint(env)
    assert checkpoint(other) == [made]
