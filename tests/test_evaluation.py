"""The evaluation stage on models that are only files: a stand-in sampler gives their answers (4 s)."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from fake_worker import write_profile

from nbg_core.base import ids
from nbg_core.config import identity
from nbg_core.config.load import load_profile
from nbg_core.config.profile import Profile
from nbg_core.evaluation import stage as evaluation_stage
from nbg_core.evaluation.accuracy import latest_summary
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import latest_materialisation
from nbg_core.lake.records import Write
from nbg_core.lineage.policy import current_policy
from nbg_core.lineage.run import Run
from nbg_core.lineage.staleness import status
from nbg_core.sampling.sampler import Response

N = 12
ANSWERS = {"student": "wrong", "new": "right", "teacher": "right"}
"""What each model says to every query."""


class Parrot:
    """A sampler whose model always says the same; `asked` is by which model."""

    asked: list[str] = []

    def __init__(self, path: Path):
        self.name = path.name

    def encode(self, messages):
        return [1]

    def decode(self, token_ids):
        return bytes(token_ids).decode()

    def stream(self, requests, decoding):
        self.asked += [self.name] * len(requests)
        for i in reversed(range(len(requests))):
            yield i, 0, Response(list(ANSWERS[self.name].encode()), [0.0], "stop")


@contextmanager
def open_parrot(run: Run, path: Path, batch_size: int):
    yield Parrot(path)


@pytest.fixture
def profile(tmp_path, monkeypatch) -> Profile:
    monkeypatch.setattr(evaluation_stage, "open_sampler", open_parrot)
    monkeypatch.setattr(Parrot, "asked", [])
    profile = load_profile(
        write_profile(tmp_path / "p", ("a",), evaluation={"batch_size": 5, "auto_promote": True, "min_queries": N})
    )
    run = open_run(profile)
    put_queries(run, "right")
    put_checkpoint(run)
    return profile


def open_run(profile: Profile, **changed) -> Run:
    evaluation_ = profile.evaluation.model_copy(update=changed)
    profile = profile.model_copy(update={"evaluation": evaluation_})
    return Run(profile, Lake.of(profile), "run", log=lambda line: None)


def put_queries(run: Run, answer: str) -> None:
    rows = [
        {"slice": "a", "query_id": f"q{i:02}", "split": "eval", "messages": [{"role": "user", "content": str(i)}],
         "prompt": str(i), "answer": answer, "verifier": "exact", "verifier_args": "{}", "source_file": "a.jsonl",
         "source_line": i + 1} for i in range(N)
    ]  # fmt: skip
    write = Write("queries", pl.DataFrame(rows), replace="slice = ?", params=("a",))
    run.commit("queries", "a", [write], data_version=answer)


def put_checkpoint(run: Run) -> str:
    folder = run.profile.resolve(run.profile.paths.checkpoints) / "new"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("trained")
    checkpoint = ids.model_id(folder)
    row = {"checkpoint_id": checkpoint, "training_id": "t", "path": "new", "parent_model_id": run.policy.model_id,
           "teacher_model_id": "t", "input_snapshot": run.lake.snapshot(), "n_pairs": 1, "n_steps": 1,
           "settings": "{}", "created_at": datetime.now(UTC)}  # fmt: skip
    run.commit("student_checkpoint", None, [Write("checkpoints", pl.DataFrame([row]))], data_version=checkpoint)
    return checkpoint


def overall(summary: list[dict]) -> tuple[float, ...]:
    return tuple(summary[-1][role] for role in ("before", "after", "teacher"))


def test_models_answer_once_and_a_corrected_answer_is_judged_from_the_texts_kept(profile):
    run = open_run(profile, auto_promote=False)
    first = evaluation_stage.materialise(run)
    assert (first.rows, first.new_rows, first.gate) == (36, 36, "passed")
    assert overall(first.summary) == (0.0, 1.0, 1.0)
    assert sorted(set(Parrot.asked)) == ["new", "student", "teacher"] and len(Parrot.asked) == 36
    again = evaluation_stage.materialise(run)
    assert (again.new_rows, again.data_version) == (0, first.data_version)
    put_queries(run, "wrong")
    corrected = evaluation_stage.materialise(run)
    assert (corrected.new_rows, len(Parrot.asked)) == (36, 36), "every text was there"
    assert overall(corrected.summary) == (1.0, 0.0, 0.0)
    assert corrected.data_version != first.data_version
    put_queries(run, "right")
    assert evaluation_stage.materialise(run).new_rows == 0
    assert overall(latest_summary(run.lake)[1].to_dicts()) == (0.0, 1.0, 1.0)


def test_two_profiles_on_one_lake_see_their_own_evaluations(profile):
    run = open_run(profile)
    evaluation_stage.materialise(run)
    other = Run(profile.model_copy(update={"name": "other"}), run.lake, "run", log=lambda line: None)
    evaluation_stage.materialise(other)
    for newest in ("other", profile.name):
        assert latest_summary(run.lake, profile=profile.name).profile == profile.name
        assert latest_summary(run.lake, profile="other").profile == "other"
        assert latest_summary(run.lake, profile="third").profile == latest_summary(run.lake).profile == newest
        evaluation_stage.materialise(run)


def test_a_run_that_was_cut_off_continues_with_the_answers_that_are_missing(profile, monkeypatch):
    run, real = open_run(profile), Parrot.stream

    def dies(self, requests, decoding):
        if len(Parrot.asked) == 10:
            raise KeyboardInterrupt
        return real(self, requests, decoding)

    monkeypatch.setattr(Parrot, "stream", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluation_stage.materialise(run)
    monkeypatch.setattr(Parrot, "stream", real)
    assert evaluation_stage.materialise(run).new_rows == 26
    assert len(Parrot.asked) == 36


def test_what_passes_the_gate_is_promoted_in_the_commit_that_ends_the_evaluation(profile):
    run = open_run(profile)
    report = evaluation_stage.materialise(run)
    assert report.promoted
    (row,) = run.lake.sql("FROM promotions").to_dicts()
    assert row["model_id"] == report.checkpoint_id == current_policy(run.lake, profile).model_id
    assert row["materialisation_id"] == latest_materialisation(run.lake, "student_eval", None)["materialisation_id"]


@pytest.mark.parametrize(("auto", "answer", "gate"), [(False, "right", "passed"), (True, "wrong", "not better")])
def test_nothing_is_promoted_that_may_not_be(profile, auto, answer, gate):
    run = open_run(profile, auto_promote=auto)
    put_queries(run, answer)
    report = evaluation_stage.materialise(run)
    assert report.gate.startswith(gate) and not report.promoted
    assert run.lake.sql("FROM promotions").is_empty()


def test_the_summary_is_of_the_settings_and_queries_of_the_evaluation_whatever_they_are_today(profile):
    run = open_run(profile)
    checkpoint = evaluation_stage.materialise(run).checkpoint_id
    before = latest_summary(run.lake)
    put_queries(run, "corrected")
    changed = open_run(profile, max_tokens=7)
    assert latest_summary(run.lake, profile="renamed").profile == profile.name, "it is as fresh for that one"
    assert latest_summary(changed.lake)[1].equals(before[1]) and before[0] == checkpoint
    assert {s.asset: s.state for s in status(changed.lake, changed.profile)}["student_eval"] == "stale"
    assert evaluation_stage.materialise(changed).new_rows == 36
    used = json.loads(latest_materialisation(run.lake, "student_eval", None)["settings"])["answering_id"]
    assert used == identity.answering_id(changed.profile) != identity.answering_id(run.profile)
