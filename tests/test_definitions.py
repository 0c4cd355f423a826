"""The Dagster definitions as a whole: what there is, what it costs to load, and that Dagster's checks pass (25 s)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from nbg_assets.definitions import build
from nbg_core.assets import ASSETS, PARTITIONED, UNPARTITIONED
from nbg_core.config.load import ProfileError
from nbg_core.config.profile import PROJECT_ROOT
from nbg_core.lake.tables import TABLES

# The method's own assets, written down apart from the registry. An asset that is added needs no row here.
GRAPH = {
    "queries": (set(), "data", True, None),
    "student_samples": ({"queries"}, "preferences", True, "model"),
    "filtered_pairs": ({"queries", "student_samples"}, "preferences", True, "model"),
    "teacher_logits": ({"filtered_pairs"}, "distillation", True, "model"),
    "reference_logprobs": ({"filtered_pairs"}, "distillation", True, "model"),
    "student_checkpoint": ({"filtered_pairs", "teacher_logits", "reference_logprobs"}, "student", False, "model"),
    "student_eval": ({"queries", "student_checkpoint"}, "student", False, "model"),
}

CHECKS = {
    "queries": {"no_train_eval_overlap": True, "has_training_queries": True, "has_held_out_queries": False},
    "student_samples": {
        "every_query_answered": True, "tokens_in_vocabulary": True, "few_truncated": False, "few_empty": False,
    },
    "filtered_pairs": {
        "has_pairs": True, "margins_wide_enough": True, "responses_exist": True, "no_truncated_positive": True,
        "no_held_out_query": True,
    },
    "teacher_logits": {"one_row_per_response": True, "lengths_match": True, "mass_is_one": True},
    "reference_logprobs": {"one_row_per_response": True, "lengths_match": True, "sampler_agrees": False},
    "student_checkpoint": {"starts_at_reference": True, "weights_intact": True, "training_set_known": True},
    "student_eval": {"better_than_before": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def defs() -> dg.Definitions:
    return build("embedded")


def test_dagster_shows_the_graph_of_the_method_and_of_the_registry(defs):
    graph = {
        spec.key.path[-1]: (
            {d.asset_key.path[-1] for d in spec.deps}, spec.group_name, spec.partitions_def is not None,
            defs.resolve_assets_def(spec.key).op.pool,
        )
        for spec in defs.resolve_all_asset_specs()
    }  # fmt: skip
    assert {name: graph.get(name) for name in GRAPH} == GRAPH
    assert {asset.name: set(asset.upstream) for asset in ASSETS} == {name: row[0] for name, row in graph.items()}
    assert set(UNPARTITIONED) == {name for name, row in graph.items() if not row[2]}


def test_every_asset_says_what_it_is_and_whose(defs):
    for spec in defs.resolve_all_asset_specs():
        table = spec.metadata["dagster/table_name"].removeprefix("lake.")
        schema = spec.metadata["dagster/column_schema"]
        assert [c.name for c in schema.columns] == TABLES[table].column_names(), spec.key
        assert all(c.description for c in schema.columns), spec.key
        assert spec.owners == ["team:post-training"] and spec.code_version and len(spec.description) > 60, spec.key
        assert spec.kinds and spec.tags["stage"] == spec.group_name, spec.key


def test_checks_and_which_of_them_block(defs):
    found: dict[str, dict[str, bool]] = {}
    for spec in defs.resolve_asset_graph().asset_check_keys:
        check = defs.resolve_asset_graph().get_check_spec(spec)
        found.setdefault(spec.asset_key.path[-1], {})[spec.name] = check.blocking
    assert {name: found.get(name) for name in CHECKS} == CHECKS
    assert {name: set(checks) for name, checks in found.items()} == {a.name: set(a.checks) for a in ASSETS if a.checks}


def test_jobs_schedules_and_sensors(defs):
    jobs = {name: defs.resolve_job_def(name) for name in ("refresh_slice", "train")}
    selected = {name: {k.path[-1] for k in job.asset_layer.executable_asset_keys} for name, job in jobs.items()}
    assert selected["train"] == set(UNPARTITIONED)
    assert selected["refresh_slice"] == set(PARTITIONED) > {"queries", "filtered_pairs"}
    assert jobs["refresh_slice"].partitions_def.name == "slice"
    schedule = defs.resolve_schedule_def("refresh_all_slices")
    assert (schedule.cron_schedule, schedule.execution_timezone, schedule.job_name) == (
        "0 3 * * *", "UTC", "refresh_slice",
    )  # fmt: skip
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    files, training = (defs.resolve_sensor_def(n) for n in ("new_query_files", "train_when_slices_fresh"))
    assert (files.job_name, files.default_status) == ("refresh_slice", dg.DefaultSensorStatus.RUNNING)
    assert (training.job_name, training.default_status) == ("train", dg.DefaultSensorStatus.RUNNING)


def test_cron_and_profile_come_from_the_chosen_profile(tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text("models: {student: s, teacher: t}\nrefresh: {cron: '*/5 * * * *', timezone: Europe/Paris}\n")
    defs = build(str(profile))
    schedule = defs.resolve_schedule_def("refresh_all_slices")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("*/5 * * * *", "Europe/Paris")
    assert defs.resources["nbg"].load().name == "mine"
    with pytest.raises(ProfileError, match="no profile 'nope'"):
        build("nope")


def test_loading_leaves_heavy_libraries_alone_and_is_quick():
    script = (
        "import sys, time, dagster; start = time.monotonic(); import nbg_assets.definitions; "
        "heavy = {'torch', 'transformers', 'deepspeed', 'matplotlib', 'reasoning_gym'} & set(sys.modules); "
        "print(time.monotonic() - start, *sorted(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PROJECT_ROOT)
    seconds, *heavy = out.stdout.split()
    assert heavy == []
    assert float(seconds) < 10  # 0.6 s on an idle machine


def test_core_does_not_know_dagster():
    modules = "nbg_core.runtime.worker, nbg_core.runtime.run_worker, nbg_core.checks.checks"
    code = f"import {modules}, sys; print('dagster' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT_ROOT)
    assert out.stdout.strip() == "False"
    for path in (PROJECT_ROOT / "nbg_core").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(
                ("import dagster", "from dagster", "import nbg_assets", "from nbg_assets")
            )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["dagster definitions validate", "dagster definitions validate -w workspace.yaml",
                                     "dg check defs", "dg list defs --json"])  # fmt: skip
def test_dagsters_own_checks_pass(command, tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    program, *args = command.split()
    out = subprocess.run(
        [Path(sys.executable).parent / program, *args], capture_output=True, text=True, cwd=PROJECT_ROOT, timeout=120
    )
    assert out.returncode == 0, out.stdout + out.stderr
    if "--json" in args:
        assert all(f'"asset_key": "{name}"' in out.stdout for name in GRAPH)
