"""Where relative paths of a profile start: its key `root`, NBG_ROOT, the folder above `profiles/`, this project."""

from pathlib import Path

import pytest

from nbg_core.config.load import ProfileError, load_profile
from nbg_core.config.profile import PROJECT_ROOT

MODELS = "models: {student: a, teacher: b}\n"


@pytest.fixture(autouse=True)
def no_root(monkeypatch):
    monkeypatch.delenv("NBG_ROOT", raising=False)


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MODELS + text)
    return path


def test_a_profile_in_profiles_is_of_the_folder_above(tmp_path, monkeypatch):
    profile = load_profile(write(tmp_path / "mine" / "profiles" / "p.yaml"))
    assert profile.root == tmp_path / "mine"
    assert profile.resolve(profile.models.student) == tmp_path / "mine" / "a"
    assert profile.resolve(profile.paths.work) == tmp_path / "mine" / "data" / "work"
    monkeypatch.chdir(tmp_path / "mine" / "profiles")
    assert load_profile("p.yaml").root == tmp_path / "mine", "by a path relative to where the user is"
    assert load_profile("embedded").root == PROJECT_ROOT


def test_a_profile_elsewhere_is_of_this_project(tmp_path):
    assert load_profile(write(tmp_path / "p.yaml")).root == PROJECT_ROOT


def test_the_key_root_is_relative_to_the_file_wherever_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_profile(write(tmp_path / "x" / "profiles" / "p.yaml", "root: ../y\n")).root == tmp_path / "x" / "y"
    assert load_profile(write(tmp_path / "x" / "q.yaml", "root: .\n")).root == tmp_path / "x"
    assert load_profile(write(tmp_path / "x" / "r.yaml", "root: /elsewhere\n")).root == Path("/elsewhere")
    with pytest.raises(ProfileError, match="root = 7"):
        load_profile(write(tmp_path / "x" / "s.yaml", "root: 7\n"))


def test_the_key_comes_before_the_environment_and_that_before_the_folder(tmp_path, monkeypatch):
    here = write(tmp_path / "x" / "profiles" / "p.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBG_ROOT", "of the environment")
    assert load_profile(here).root == tmp_path / "of the environment"
    assert load_profile(write(tmp_path / "q.yaml")).root == tmp_path / "of the environment"
    assert load_profile("embedded").root == tmp_path / "of the environment"
    assert load_profile(write(tmp_path / "x" / "profiles" / "k.yaml", "root: ..\n")).root == tmp_path / "x"
