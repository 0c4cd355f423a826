"""A name is looked at before any path is made of it: through the real worker and the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_worker import write_profile

from nbg_core.base.names import file_name_problem
from nbg_core.config.load import ProfileError, load_profile
from nbg_core.config.profile import PROJECT_ROOT
from nbg_core.lineage.policy import checkpoint_folder
from nbg_core.runtime.run_worker import run_worker


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A profile whose work folder is three levels down, so that `../../x` still lies below the temporary folder."""
    paths = {"queries": "queries", "work": "some/where/work", "checkpoints": "checkpoints"}
    path = write_profile(tmp_path / "project", ("a",))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"paths": paths}))
    monkeypatch.setenv("NBG_PROFILE", str(path))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster_home"))
    return tmp_path


def files(folder: Path) -> set[str]:
    """All files and folders but the lake's own, and Dagster's."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    return {name for name in found if not name.startswith(("project/lake", "dagster_home"))}


def python(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=240, env={**os.environ})


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--slice", "../../x"], "'../../x' cannot be a slice: it starts with '.'"),
        (["--slice", "x/../../y"], "'x/../../y' cannot be a slice: it holds a path separator"),
        (["--slice", "a", "--run-id", "../x"], "'../x' cannot be a run id: it starts with '.'"),
    ],
)
def test_the_worker_refuses_a_name_that_leads_elsewhere_and_writes_nothing(project, args, sentence):
    before = files(project)
    done = python("-m", "nbg_core.runtime.worker", "queries", *args)
    assert done.returncode == 1
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["error"].startswith(sentence) and "\n" not in report["error"]
    assert files(project) == before


def test_the_caller_of_the_worker_makes_no_log_of_such_a_name(project):
    before = files(project)
    for slice_name, run_id in [("../../x", "r"), ("a", "../../x"), ("a", "x/y"), ("a", "")]:
        with pytest.raises(ValueError, match="cannot be a"):
            run_worker("queries", slice_name, run_id)
    assert files(project) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "sentence"),
    [("status", "'../x' cannot be a slice: it starts with '.'"), ("run", "no slice '../x'; slices: a")],
)
def test_the_command_refuses_such_a_slice_and_writes_nothing(project, command, sentence):
    before = files(project)
    done = python("-m", "nbg_assets.cli", command, "--slice", "../x")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {sentence}") and "Traceback" not in done.stderr
    assert files(project) == before


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", ".hidden", "a/b", "a\\b", "/etc", "a\nb", "a\x00b", "a ", "x" * 201]
)
def test_what_cannot_be_a_name_in_a_folder(name):
    assert file_name_problem(name)


@pytest.mark.parametrize("name", ["a", "größe", "x..y", "it's 100%", "x" * 200])
def test_what_can(name):
    assert file_name_problem(name) is None


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "a/b", ".."])
def test_a_row_of_the_lake_does_not_lead_out_of_the_checkpoints(project, name):
    profile = load_profile()
    assert checkpoint_folder(profile, "abc") == project / "project" / "checkpoints" / "abc"
    with pytest.raises(ValueError, match="cannot be a checkpoint's folder in .*checkpoints"):
        checkpoint_folder(profile, name)


def test_a_profile_that_is_named_lies_in_the_profiles():
    assert (PROJECT_ROOT / "profiles" / ".." / "profiles" / "embedded.yaml").is_file()
    with pytest.raises(ProfileError, match="no profile '../profiles/embedded'.*or give a .yaml path"):
        load_profile("../profiles/embedded")
