"""Staleness, tracing and the policy, on a lake filled by hand (nothing here needs a model that runs)."""

import dataclasses
from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbg_core.assets import BY_NAME, settings_of, upstream_partitions
from nbg_core.base.ids import content_version, digest, model_id
from nbg_core.config import identity
from nbg_core.config.profile import Profile
from nbg_core.config.slices import slice_names
from nbg_core.evaluation.promotion import promote
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import input_of
from nbg_core.lake.records import Record, Write
from nbg_core.lineage.policy import current_policy
from nbg_core.lineage.run import Run
from nbg_core.lineage.staleness import status
from nbg_core.lineage.trace import trace
from nbg_core.scorers.scorers import SCORERS


def model_folder(path, weights: bytes):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


@pytest.fixture
def profile(tmp_path):
    model_folder(tmp_path / "student", b"student")
    model_folder(tmp_path / "teacher", b"teacher")
    queries = tmp_path / "data" / "queries"
    queries.mkdir(parents=True)
    for name in ("a", "b"):
        (queries / f"{name}.jsonl").write_text('{"prompt": "x"}\n')
    return Profile.model_validate(
        {"name": "t", "root": tmp_path, "models": {"student": "student", "teacher": "teacher"}}
    )


@pytest.fixture
def run(profile):
    return Run(profile, Lake.of(profile), run_id="r", log=lambda line: None)


def make(run: Run, asset: str, slice_name: str | None, version: str = "v1") -> None:
    """Materialise a partition with the given content, reading its upstreams as they are."""
    slices = slice_names(run.profile) if slice_name is None else [slice_name]
    snapshot = run.lake.snapshot()
    inputs = [input_of(run.lake, *p, snapshot) for p in upstream_partitions(asset, slice_name, slices)]
    run.commit(asset, slice_name, inputs=inputs, data_version=version)


def make_all(run: Run) -> None:
    for s in status(run.lake, run.profile):
        make(run, s.asset, s.slice_name)


def states(run: Run) -> dict:
    return {(s.asset, s.slice_name): (s.state, s.why) for s in status(run.lake, run.profile)}


def not_fresh(run: Run) -> set:
    return {key for key, (state, _) in states(run).items() if state != "fresh"}


def test_everything_is_missing_then_fresh(run):
    assert {state for state, _ in states(run).values()} == {"missing"}
    assert len(states(run)) == 5 * 2 + 2
    make_all(run)
    assert not_fresh(run) == set()


def test_a_changed_file_makes_its_slice_and_what_reads_all_slices_stale(run):
    make_all(run)
    (run.profile.resolve("data/queries") / "a.jsonl").write_text('{"prompt": "y"}\n')
    stale = not_fresh(run)
    assert {s for _, s in stale} == {"a", None}
    assert states(run)["queries", "a"] == ("stale", "changed: file")
    assert states(run)["filtered_pairs", "a"][1] == "queries[a] is stale"


def test_an_upstream_that_ran_again_without_change_makes_nothing_stale(run):
    make_all(run)
    make(run, "student_samples", "a", "v1")
    assert not_fresh(run) == set()
    make(run, "student_samples", "a", "v2")
    assert states(run)["filtered_pairs", "a"] == ("stale", "student_samples[a] changed")
    assert ("filtered_pairs", "b") not in not_fresh(run)


def test_a_setting_makes_stale_what_depends_on_it_and_nothing_above(run):
    make_all(run)
    changed = run.profile.model_copy(
        update={"preference": run.profile.preference.model_copy(update={"min_margin": 0.9})}
    )
    stale = {s.asset: s.why for s in status(run.lake, changed, ["a"]) if s.state != "fresh"}
    assert stale["filtered_pairs"] == "changed: min_margin"
    weights = {"verifier": 1.0, "teacher_loglik": 0.0, "brevity": None}
    changed.preference.weights.update(weights)
    why = {s.asset: s.why for s in status(run.lake, changed, ["a"])}
    assert why["filtered_pairs"] == "changed: min_margin, weights.brevity"
    assert stale.keys() == {
        "filtered_pairs",
        "teacher_logits",
        "reference_logprobs",
        "student_checkpoint",
        "student_eval",
    }


def test_another_dtype_makes_stale_whatever_a_model_computed(run):
    make_all(run)
    models = run.profile.models.model_copy(update={"dtype": "bfloat16"})
    rounded = run.profile.model_copy(update={"models": models})
    why = {s.asset: s.why for s in status(run.lake, rounded, ["a"])}
    assert {a for a, reason in why.items() if reason} == set(BY_NAME) - {"queries"}
    assert {a: reason for a, reason in why.items() if reason.startswith("changed")} == {
        "student_samples": "changed: sampling_id", "teacher_logits": "changed: storage_id",
        "reference_logprobs": "changed: scoring_id", "student_checkpoint": "changed: storage_id",
        "student_eval": "changed: answering_id",
    }  # fmt: skip
    preference = run.profile.preference.model_copy(update={"weights": {"teacher_loglik": 1.0}})
    scored = run.profile.model_copy(update={"preference": preference})
    make_all(Run(scored, run.lake, log=lambda line: None))
    rounded = scored.model_copy(update={"models": models})
    why = {s.asset: s.why for s in status(run.lake, rounded, ["a"])}
    assert why["filtered_pairs"] == "changed: scoring_id"


def test_a_raised_version_of_a_scorer_makes_what_it_scored_stale(run, monkeypatch):
    make_all(run)
    assert not_fresh(run) == set()
    raised = dataclasses.replace(SCORERS["teacher_loglik"], version="2")
    monkeypatch.setitem(SCORERS, "teacher_loglik", raised)
    assert not_fresh(run) == set(), "it has no weight"
    monkeypatch.setitem(SCORERS, "verifier", dataclasses.replace(SCORERS["verifier"], version="2"))
    why = {s.asset: s.why for s in status(run.lake, run.profile, ["a"])}
    assert why["filtered_pairs"] == "changed: version of verifier" == why["student_eval"]
    assert why["student_samples"] == ""


def test_another_teacher_makes_the_scores_that_it_gave_stale(run):
    scored = run.profile.preference.model_copy(update={"weights": {"teacher_loglik": 1.0}})
    profile = run.profile.model_copy(update={"preference": scored})
    make_all(Run(profile, run.lake, log=lambda line: None))
    other = model_folder(run.profile.root / "other", b"other teacher")
    models = profile.models.model_copy(update={"teacher": other})
    why = {s.asset: s.why for s in status(run.lake, profile.model_copy(update={"models": models}), ["a"])}
    assert why["filtered_pairs"] == "changed: teacher"
    by_verifier = run.profile.model_copy(update={"models": models})
    make_all(run)
    why = {s.asset: s.why for s in status(run.lake, by_verifier, ["a"])}
    assert why["filtered_pairs"] == "" and why["teacher_logits"] == "changed: teacher"


def test_another_vllm_makes_the_scores_of_the_teacher_stale_and_another_transformers_does_not(run, monkeypatch):
    def why(profile: Profile) -> str:
        return next(s.why for s in status(run.lake, profile, ["a"]) if s.asset == "filtered_pairs")

    def scored_by(engine: str) -> Profile:
        preference = run.profile.preference.model_copy(update={"weights": {"teacher_loglik": 1.0}})
        teacher = run.profile.teacher.model_copy(update={"engine": engine})
        return run.profile.model_copy(update={"preference": preference, "teacher": teacher})

    profile = scored_by("vllm")
    make_all(Run(profile, run.lake, log=lambda line: None))
    assert why(profile) == ""
    vllm = profile.vllm.model_copy(update={"version": "9.9"})
    assert why(profile.model_copy(update={"vllm": vllm})) == "changed: loglik_engine"
    profile = scored_by("transformers")
    before = settings_of("filtered_pairs", profile, "policy", "a")
    monkeypatch.setattr(identity.importlib.metadata, "version", lambda package: "9.9")
    assert settings_of("filtered_pairs", profile, "policy", "a") == before, "their versions agree up to rounding"


def test_a_new_slice_and_a_gone_one_are_noticed(run):
    make_all(run)
    folder = run.profile.resolve("data/queries")
    (folder / "c.parquet").write_bytes(b"")
    assert states(run)["student_checkpoint", None][1] == "filtered_pairs[c] is new"
    (folder / "c.parquet").unlink()
    (folder / "b.jsonl").unlink()
    assert states(run)["student_checkpoint", None] == ("stale", "filtered_pairs[b] is gone")


def test_chunks_do_not_count_as_done(run):
    run.commit("queries", "a")
    assert states(run)["queries", "a"] == ("missing", "never materialised")


def test_a_missing_query_file_names_what_is_there(run):
    with pytest.raises(FileNotFoundError, match="no zz.jsonl or zz.parquet in .*; slices there: a, b"):
        status(run.lake, run.profile, ["zz"])


def test_what_reads_all_slices_is_held_to_all_of_them_whichever_are_shown(run):
    make_all(run)
    shown = status(run.lake, run.profile, ["a"])
    assert {s.slice_name for s in shown} == {"a", None} and {s.state for s in shown} == {"fresh"}
    (run.profile.resolve("data/queries") / "b.jsonl").write_text('{"prompt": "y"}\n')
    why = {s.asset: s.why for s in status(run.lake, run.profile, ["a"]) if s.state != "fresh"}
    assert why == {
        "student_checkpoint": "filtered_pairs[b] is stale",
        "student_eval": "queries[b] is stale",
    }


def test_promotion_changes_the_policy_and_makes_samples_stale(run):
    make_all(run)
    before = current_policy(run.lake, run.profile)
    trained = model_folder(run.profile.resolve("data/checkpoints") / "c1", b"trained")
    identity = model_id(trained)
    add_checkpoint(run, identity, "c1", ["p1"])
    promote(run.lake, run.profile, identity[:8], "test")
    after = current_policy(run.lake, run.profile)
    assert (before.promoted, after.promoted, after.model_id, after.path) == (False, True, identity, trained)
    promote(run.lake, run.profile, "sft", "back")
    back = current_policy(run.lake, run.profile)
    assert back.model_id == before.model_id and back.path.samefile(before.path)
    promote(run.lake, run.profile, identity[:8], "test")
    assert states(run)["student_samples", "a"] == ("stale", "changed: student")
    assert states(run)["queries", "a"][0] == "fresh"
    promote(run.lake, run.profile, "sft", "back")
    trained.rename(trained.with_name("elsewhere"))
    with pytest.raises(
        FileNotFoundError, match=f"the checkpoint {identity} is not at .*; restore the folder, or promote"
    ):
        promote(run.lake, run.profile, identity[:8], "gone")
    assert current_policy(run.lake, run.profile).model_id == before.model_id, "nothing was promoted"
    trained.with_name("elsewhere").rename(trained)
    promote(run.lake, run.profile, identity[:8], "test")
    (trained / "model.safetensors").write_bytes(b"tampered")
    with pytest.raises(ValueError, match="is no longer .*; restore the folder"):
        current_policy(run.lake, run.profile)


def test_promoting_an_unknown_checkpoint_lists_the_known(run):
    with pytest.raises(LookupError, match="no checkpoint 'nope'; known: none yet"):
        promote(run.lake, run.profile, "nope", "test")


def add_rows(run: Run) -> None:
    sample = {"slice": "a", "query_id": "q1", "source": "student", "model_id": "m", "sampling_id": "s",
              "sample_index": 0, "seed": 1, "prompt_token_ids": [1], "token_ids": [2], "logprobs": [-0.1],
              "finish_reason": "stop", "text": "x"}  # fmt: skip
    query = {"slice": "a", "split": "train", "messages": [{"role": "user", "content": "x"}], "prompt": "x",
             "answer": None, "verifier": None, "verifier_args": None, "source_file": "a", "source_line": 1}  # fmt: skip
    pair = {"slice": "a", "query_id": "q1", "chosen_score": 1.0, "rejected_score": 0.0, "margin": 1.0}
    writes = [
        Write("queries", pl.DataFrame([query | {"query_id": "q1"}, query | {"query_id": "q2"}])),
        Write("samples", pl.DataFrame([sample | {"sample_id": s} for s in ("s1", "s2", "s3")])),
        Write("pairs", pl.DataFrame([pair | {"pair_id": "p1", "chosen_id": "s1", "rejected_id": "s2"}])),
    ]
    run.lake.commit(Record("filtered_pairs", "a", "r", "t"), writes)


def add_checkpoint(run: Run, checkpoint: str, path: str, pairs: list[str]) -> None:
    row = {"checkpoint_id": checkpoint, "training_id": f"t-{checkpoint}", "path": path, "parent_model_id": "m",
           "teacher_model_id": "t", "input_snapshot": run.lake.snapshot(), "n_pairs": len(pairs), "n_steps": 1,
           "settings": "{}", "created_at": datetime.now(UTC)}  # fmt: skip
    used = [{"training_id": f"t-{checkpoint}", "checkpoint_id": checkpoint, "pair_id": p, "step": 0, "epoch": 0,
             "slice": "a"} for p in pairs]  # fmt: skip
    writes = [Write("checkpoints", pl.DataFrame([row])), Write("checkpoint_pairs", pl.DataFrame(used))]
    run.lake.commit(Record("student_checkpoint", None, "r", "t"), writes)


def test_a_checkpoint_is_traced_to_its_queries_even_after_its_pairs_were_replaced(run):
    add_rows(run)
    add_checkpoint(run, "c1", "c1", ["p1"])
    run.lake.commit(Record("filtered_pairs", "a", "r2", "t"), [
        Write("pairs", pl.DataFrame(schema=run.lake.sql("FROM pairs").drop("materialisation_id").schema),
              replace="slice = ?", params=("a",))])  # fmt: skip
    assert run.lake.sql("FROM pairs").is_empty()
    found = trace(run.lake, "c1")
    assert found["pairs"]["pair_id"].to_list() == ["p1"]
    assert found["samples"]["sample_id"].to_list() == ["s1", "s2"]
    assert found["queries"]["query_id"].to_list() == ["q1"]


def test_a_query_is_traced_to_the_checkpoints_it_trained(run):
    add_rows(run)
    add_checkpoint(run, "c1", "c1", ["p1"])
    found = trace(run.lake, "q1")
    assert found["checkpoints"]["checkpoint_id"].to_list() == ["c1"]
    assert trace(run.lake, "q2")["checkpoints"].is_empty()
    assert trace(run.lake, "s2")["pairs"]["pair_id"].to_list() == ["p1"]


def replace_pairs(run: Run, *pairs: dict) -> None:
    rows = pl.DataFrame(list(pairs), schema=run.lake.sql("FROM pairs").drop("materialisation_id").schema)
    run.commit("filtered_pairs", "a", [Write("pairs", rows, replace="slice = ?", params=("a",))], data_version="new")


def test_what_a_replaced_pair_was_made_of_is_traced_to_the_checkpoint_it_trained(run):
    add_rows(run)
    add_checkpoint(run, "c1", "c1", ["p1"])
    replace_pairs(run, {"slice": "a", "pair_id": "p2", "query_id": "q1", "chosen_id": "s1", "rejected_id": "s3",
                        "chosen_score": 1.0, "rejected_score": 0.0, "margin": 1.0})  # fmt: skip
    add_checkpoint(run, "c2", "c2", ["p2"])
    for start, pairs, checkpoints in [("p1", ["p1"], ["c1"]), ("s2", ["p1"], ["c1"]), ("s3", ["p2"], ["c2"]),
                                   ("s1", ["p1", "p2"], ["c1", "c2"]), ("q1", ["p1", "p2"], ["c1", "c2"]),
                                   ("c1", ["p1"], ["c1"]), ("t-c2", ["p2"], ["c2"])]:  # fmt: skip
        found = trace(run.lake, start)
        assert found["pairs"]["pair_id"].to_list() == pairs, start
        assert found["checkpoints"]["checkpoint_id"].to_list() == checkpoints, start
        assert found["queries"]["query_id"].to_list() == ["q1"], start


def test_a_checkpoint_shows_its_pairs_as_they_were_when_it_was_trained(run):
    add_rows(run)
    add_checkpoint(run, "c1", "c1", ["p1"])
    replace_pairs(run, {"slice": "a", "pair_id": "p1", "query_id": "q1", "chosen_id": "s1", "rejected_id": "s2",
                        "chosen_score": 3.0, "rejected_score": 0.0, "margin": 3.0})  # fmt: skip
    assert trace(run.lake, "c1")["pairs"]["margin"].to_list() == [1.0]
    assert trace(run.lake, "p1")["pairs"]["margin"].to_list() == [3.0]


def test_a_beginning_must_belong_to_one_id(run):
    add_rows(run)
    for checkpoint in ("c1", "c2", "c20"):
        add_checkpoint(run, checkpoint, checkpoint, ["p1"])
    assert trace(run.lake, "c2")["checkpoints"]["checkpoint_id"].to_list() == ["c2"]
    assert trace(run.lake, "p")["checkpoints"].height == 3
    for what, promise in [("", "give the id of a checkpoint"), ("c", "'c' is the beginning of 3 ids, c1 and c2 among")]:
        with pytest.raises(LookupError, match=promise):
            trace(run.lake, what)
        with pytest.raises(LookupError, match=promise):
            promote(run.lake, run.profile, what, "test")
    with pytest.raises(LookupError, match="no checkpoint '%'; known: c1, c2, c20"):
        promote(run.lake, run.profile, "%", "test")
    assert run.lake.sql("FROM promotions").is_empty()


def test_an_input_is_what_was_there_at_the_snapshot_read(run):
    make(run, "queries", "a", "v1")
    snapshot = run.lake.snapshot()
    make(run, "queries", "a", "v2")
    assert input_of(run.lake, "queries", "a", snapshot).data_version == "v1"
    assert input_of(run.lake, "queries", "a", run.lake.snapshot()).data_version == "v2"
    with pytest.raises(LookupError, match=r"queries\[b\] has not been materialised"):
        make(run, "queries", "b")
        input_of(run.lake, "queries", "b", snapshot)


def test_an_unknown_id_is_said_to_be_unknown(run):
    with pytest.raises(LookupError, match="starts with 'zzz'"):
        trace(run.lake, "zzz")


def test_content_versions_ignore_order():
    assert content_version(["x", "y"]) == content_version(["y", "x"]) != content_version(["x"])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_a_content_version_is_the_same_without_holding_the_ids(found):
    expected = digest("content", sorted(found))
    assert content_version(found) == content_version(iter(sorted(found)), in_order=True) == expected
