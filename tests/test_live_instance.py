"""A live instance: the sensor, the schedule, the training that follows it and a termination, through the real daemon
(100 s).

One `dagster dev` on tiny models. A training run of very many steps is started, and ended, while a schedule that ticks
every minute and a new query file start runs of their own. What the schedule refreshed is then trained on.
"""

from __future__ import annotations

import json
import os
import time

import numpy as np
import polars as pl
import pytest
import yaml
from live import SELECTOR, Live, dagster_dev, processes_naming
from training_lake import make_profile as make_training_profile

from nbg_core.base import ids
from nbg_core.config.load import load_profile
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Write
from nbg_core.lineage.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def live(folder):
    """The server, with its schedule on and a training run started."""
    profile = make_training_profile(folder, epochs=100_000, global_batch_pairs=4, save_every=1000)
    give_queries(profile)
    path = folder / "live.yaml"
    data = profile.model_dump(mode="json", exclude_unset=True) | {
        "refresh": {"cron": "* * * * *"},
        "sampling": {"n_student": 3, "max_tokens": 6},  # random models: the teacher's taste, not a right answer
        "preference": {"weights": {"teacher_loglik": 1.0}, "min_margin": 1e-3, "truncated_positive": True},
    }
    path.write_text(yaml.safe_dump(data))
    with dagster_dev(path, folder) as live:
        yield live


def give_queries(profile) -> None:
    """Rows of `queries` for the pairs that the training lake holds."""
    run = Run(profile, Lake.of(profile), log=lambda _: None)
    for slice_name in ("alpha", "beta"):
        pairs = run.lake.sql("SELECT query_id FROM pairs WHERE slice = ?", [slice_name])
        frame = pairs.select("query_id").with_row_index("source_line").with_columns(
            pl.lit(slice_name).alias("slice"), pl.lit("train").alias("split"), pl.lit("f").alias("source_file"),
            pl.format(f"{slice_name} {{}}", "source_line").alias("prompt"), pl.lit(None, pl.String).alias("answer"),
            pl.lit(None, pl.String).alias("verifier"), pl.lit(None, pl.String).alias("verifier_args"),
        )  # fmt: skip
        messages = [[{"role": "user", "content": p}] for p in frame["prompt"]]
        frame = frame.with_columns(pl.Series("messages", messages))
        run.commit(
            "queries",
            slice_name,
            [Write("queries", frame)],
            data_version=ids.content_version(frame["query_id"].to_list()),
        )


def rows(seed: str, n: int = 8) -> str:
    rng = np.random.default_rng(ids.seed_from(seed))
    words = [" ".join(f"w{i}" for i in rng.integers(2, 40, 6)) for _ in range(n)]
    row = {"answer": "w3", "verifier": "exact"}
    split = ["eval" if i < 2 else "train" for i in range(n)]
    return "".join(json.dumps({"prompt": w, "split": s, **row}) + "\n" for w, s in zip(words, split, strict=True))


def run_with(live: Live, tag: str, value: str, partition: str | None = None) -> dict | None:
    for run in live.runs():
        if run["tags"].get(tag) == value and run["tags"].get("dagster/partition") == partition:
            return run
    return None


def test_termination_sensor_and_schedule(live, folder):
    training = live.launch("train", ["student_checkpoint"])
    ranks = live.until("training rank", lambda: training_ranks(folder), 60)
    live.until("optimizer step", lambda: list((folder / "work" / "training").glob("*/steps.jsonl")), 60)

    # while it trains: the schedule goes on, alpha gets another file, beta loses its own, and a new one is dropped
    schedule = live.ask(
        """mutation ($s: ScheduleSelector!) { startSchedule(scheduleSelector: $s) {
             __typename ... on ScheduleStateResult { scheduleState { status } } } }""",
        s=SELECTOR | {"scheduleName": "refresh_all_slices"},
    )["startSchedule"]
    assert schedule["scheduleState"]["status"] == "RUNNING"
    assert live.partitions() == ["alpha", "beta"]
    (folder / "queries" / "beta.jsonl").unlink()
    for name in ("alpha", "dropped"):
        path = folder / "queries" / f"{name}.jsonl"
        path.write_text(rows(name))
        os.utime(path, (time.time() - 60,) * 2)

    family = [*processes_naming(training), *ranks]
    assert status_of(live, training) == "STARTED" and len(family) >= 3, family
    answer = live.ask("mutation ($id: String!) { terminateRun(runId: $id) { __typename } }", id=training)
    assert answer["terminateRun"]["__typename"] == "TerminateRunSuccess"
    live.until("end of the training run", lambda: status_of(live, training) == "CANCELED", 40)
    assert not [p for p in family if p.is_running()] and not training_ranks(folder)

    live.until("partition of the new file", lambda: "dropped" in live.partitions(), 45)
    live.until("run of the sensor", lambda: run_with(live, "dagster/sensor_name", "new_query_files", "dropped"), 30)
    run = live.until(
        "run of the schedule", lambda: run_with(live, "dagster/schedule_name", "refresh_all_slices", "alpha"), 75
    )
    assert run["jobName"] == "refresh_slice"
    live.until("queries of both", lambda: {"alpha", "dropped"} <= ingested(folder), 60)

    # the new file goes again, so that what the schedule's own run refreshes is all there is to train on
    dropped = run_with(live, "dagster/sensor_name", "new_query_files", "dropped")["runId"]
    (folder / "queries" / "dropped.jsonl").unlink()
    profile = yaml.safe_load((folder / "live.yaml").read_text())
    profile["training"]["epochs"] = 1
    (folder / "live.yaml").write_text(yaml.safe_dump(profile))
    live.ask("mutation ($id: String!) { terminateRun(runId: $id) { __typename } }", id=dropped)
    trained = live.until(
        "run of training", lambda: run_with(live, "dagster/sensor_name", "train_when_slices_fresh"), 180
    )["runId"]
    live.until("trained checkpoint", lambda: committed(folder, trained) or ended(live, trained), 180)
    assert "student_checkpoint" in committed(folder, trained), live.log.read_text()[-4000:]


def committed(folder, run_id: str) -> set[str]:
    """Assets that a Dagster run has made."""
    lake = Lake.of(load_profile(folder / "live.yaml"))
    query = "SELECT asset FROM lineage.materialisations WHERE run_id = ? AND status = 'complete'"
    return set(lake.sql(query, [run_id])["asset"])


def ended(live: Live, run_id: str) -> bool:
    return status_of(live, run_id) in ("SUCCESS", "FAILURE", "CANCELED")


def status_of(live: Live, run_id: str) -> str:
    return next(r["status"] for r in live.runs() if r["runId"] == run_id)


def ingested(folder) -> set[str]:
    """Slices whose queries a Dagster run has made."""
    lake = Lake.of(load_profile(folder / "live.yaml"))
    return set(lake.sql("SELECT slice FROM lineage.commits WHERE asset = 'queries' AND run_id <> 'local'")["slice"])


def training_ranks(folder) -> list:
    return [p for p in processes_naming(str(folder)) if "nbg_core.training.train" in " ".join(p.cmdline())]
