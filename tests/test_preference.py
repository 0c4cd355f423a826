"""Pairs: chosen by exhaustive comparison and by ours, and the stage on a lake whose responses are written by hand."""

import json
from dataclasses import asdict

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from nbg_core.base.ids import content_version, query_id, sample_id
from nbg_core.config.profile import PreferenceSettings
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import current_samples, input_of, latest_materialisation
from nbg_core.lake.records import Write
from nbg_core.lineage.run import Run
from nbg_core.lineage.staleness import status
from nbg_core.preference.pairs import REASONS, select_pairs
from nbg_core.preference.stage import NoPairsError, materialise
from nbg_core.scorers import scorers, verifiers

# --- selection -------------------------------------------------------------------------------------------------------

SCHEMA = {"query_id": pl.String, "sample_id": pl.String, "finish_reason": pl.String, "text": pl.String,
          "verifier": pl.Float64, "teacher_loglik": pl.Float64}  # fmt: skip
BOTH = {"verifier": 1.0, "teacher_loglik": 0.5}


def frame(rows):
    return pl.DataFrame(rows, schema=SCHEMA)


def response(sample, verifier=None, teacher=None, text=None, finish="stop", query="q"):
    return {"query_id": query, "sample_id": sample, "finish_reason": finish, "text": sample if text is None else text,
            "verifier": verifier, "teacher_loglik": teacher}  # fmt: skip


def combined(row, weights):
    """The weighted sum, exact: every value is a multiple of 1/16."""
    scores = [weights[s] * row[s] for s in weights if weights[s] and row[s] is not None]
    return sum(scores) if scores else None


def exhaustive(rows, s):
    """All (chosen, rejected) by trying every pair of responses, widest margin first."""
    pairs = []
    for query in {r["query_id"] for r in rows}:
        scored = [(r, combined(r, s.weights)) for r in rows if r["query_id"] == query]
        scored = [x for x in scored if x[1] is not None]
        possible = [
            (-(a - b), p["sample_id"], n["sample_id"], p["text"], n["text"])
            for p, a in scored for n, b in scored
            if a - b >= s.min_margin and p["text"] != n["text"]
            and (s.truncated_positive or p["finish_reason"] != "length")
        ]  # fmt: skip
        used, taken = set(), 0
        for _, p, n, *texts in sorted(possible):
            if taken < s.max_pairs_per_query and not used & set(texts):
                used |= set(texts)
                taken += 1
                pairs.append((query, p, n))
    return sorted(pairs)


grid = st.one_of(st.none(), st.integers(-16, 16).map(lambda n: n / 8))
rows = st.lists(
    st.tuples(st.sampled_from("qrs"), grid, grid, st.sampled_from("abcdefg"), st.sampled_from(["stop", "length"])),
    max_size=24,
).map(lambda found: [response(f"s{i:02}", v, t, x, f, q) for i, (q, v, t, x, f) in enumerate(found)])  # fmt: skip
preferences = st.builds(
    PreferenceSettings,
    weights=st.sampled_from([{"verifier": 1.0}, {"teacher_loglik": 1.0, "verifier": 0.0}, BOTH]),
    min_margin=st.sampled_from([0.25, 0.5, 1.0]),
    max_pairs_per_query=st.integers(1, 4),
    truncated_positive=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(rows, preferences, st.randoms(use_true_random=False))
def test_pairs_are_those_of_an_exhaustive_comparison_in_any_order(rows, s, random):
    pairs, rejections = select_pairs(frame(rows), s)
    assert sorted(pairs.select("query_id", "chosen_id", "rejected_id").iter_rows()) == exhaustive(rows, s)
    shuffled = random.sample(rows, len(rows))
    again, rejected_again = select_pairs(frame(shuffled), s)
    assert again.equals(pairs) and rejected_again.equals(rejections)


@settings(max_examples=200, deadline=None)
@given(rows, preferences)
def test_what_holds_of_every_selection(rows, s):
    pairs, rejections = select_pairs(frame(rows), s)
    by_id = {r["sample_id"]: r for r in rows}
    for pair in pairs.iter_rows(named=True):
        chosen, rejected = by_id[pair["chosen_id"]], by_id[pair["rejected_id"]]
        assert chosen["query_id"] == rejected["query_id"] == pair["query_id"]
        assert chosen["text"] != rejected["text"]
        assert pair["margin"] >= s.min_margin
        assert pair["margin"] == combined(chosen, s.weights) - combined(rejected, s.weights)
        assert s.truncated_positive or chosen["finish_reason"] == "stop"
    used = [i for column in ("chosen_id", "rejected_id") for i in pairs[column]]
    assert len(used) == len(set(used))
    assert pairs.group_by("query_id").len()["len"].max() in (None, *range(1, s.max_pairs_per_query + 1))
    with_pairs, without = set(pairs["query_id"]), rejections["query_id"].to_list()
    assert sorted([*with_pairs, *without]) == sorted({r["query_id"] for r in rows})
    assert rejections["reason"].is_in(list(REASONS)).all()


@pytest.mark.parametrize(
    ("responses", "reason", "ids", "detail"),
    [
        ([response("a"), response("b")], "unscored", (None, None), "2 responses, no score"),
        ([response("a", 1.0)], "single_response", (None, None), "1 scored response of 1, score 1"),
        ([response("a", 1.0), response("b", 1.0)], "all_correct", ("a", "b"), "verifier score 1 of all 2 responses"),
        ([response("a", 0.0), response("b", 0.0)], "all_wrong", ("a", "b"), "verifier score 0 of all 2 responses"),
        ([response("a", 1.0, text=""), response("b", 1.0, text="")], "all_correct", (None, None), "verifier score 1"),
        ([response("a", 0.5, text="x"), response("b", 0.5, text="x")], "identical", (None, None), "one text: 'x'"),
        ([response("a", 0.6), response("b", 0.2)], "no_margin", ("a", "b"), "margin 0.4, min_margin 0.5; scores"),
        ([response("a", 1.0, finish="length"), response("b", 0.2)], "truncated_positive", ("a", "b"), "margin 0.8"),
    ],
)  # fmt: skip
def test_a_query_without_a_pair_says_why(responses, reason, ids, detail):
    pairs, rejections = select_pairs(frame(responses), PreferenceSettings())
    assert pairs.is_empty()
    row = rejections.row(0, named=True)
    assert (row["stage"], row["query_id"], row["reason"]) == ("pairs", "q", reason)
    assert (row["chosen_id"], row["rejected_id"]) == ids
    assert detail in row["detail"]


def test_the_same_text_far_apart_is_no_pair():
    s = PreferenceSettings(weights={"teacher_loglik": 1.0})
    rows = [response("a", teacher=-0.1, text="x"), response("b", teacher=-3.0, text="x", finish="length")]
    assert select_pairs(frame(rows), s)[1]["reason"].to_list() == ["identical"]
    pairs, _ = select_pairs(frame([*rows, response("c", teacher=-1.0)]), s)
    assert list(pairs.select("chosen_id", "rejected_id").iter_rows()) == [("c", "b")]  # wider than (a, c)


def test_rounding_in_the_weights_does_not_cost_a_margin():
    assert 0.7 - 0.2 < 0.5
    pairs, _ = select_pairs(frame([response("a", 0.7), response("b", 0.2)]), PreferenceSettings(min_margin=0.5))
    assert pairs.height == 1


# --- the stage, on a lake --------------------------------------------------------------------------------------------


@pytest.fixture
def open_run(make_profile):
    def open_run(**overrides) -> Run:
        profile = make_profile(**overrides)
        return Run(profile, Lake.of(profile), "run", log=lambda line: None)

    return open_run


FOUR = {"n_student": 4, "n_teacher": 0}


def put_queries(run, rows, slice_name="a"):
    """rows: (prompt, answer, verifier, verifier_args, split)"""
    found = []
    for prompt, answer, verifier, args, split in rows:
        messages = [{"role": "user", "content": prompt}]
        found.append({"slice": slice_name, "query_id": query_id(messages), "split": split, "messages": messages,
                      "prompt": prompt, "answer": answer, "verifier": verifier, "verifier_args": args,
                      "source_file": "f", "source_line": 1})  # fmt: skip
    file = run.profile.resolve(run.profile.paths.queries) / f"{slice_name}.jsonl"
    file.write_text(json.dumps(rows))
    schema = {"answer": pl.String, "verifier": pl.String, "verifier_args": pl.String}
    write = Write("queries", pl.DataFrame(found, schema_overrides=schema), replace="slice = ?", params=(slice_name,))
    run.commit("queries", slice_name, [write], data_version=content_version([json.dumps(r) for r in rows]))
    return [r["query_id"] for r in found]


def put_samples(run, texts, slice_name="a", source="student", **more):
    """texts: query_id -> texts of its responses, in order of index; a text that ends in '~' is truncated."""
    settings = run.settings("student_samples", slice_name)
    rows = []
    for query, responses in texts.items():
        for i, text in enumerate(responses):
            model = settings[source]
            rows.append({
                "slice": slice_name, "sample_id": sample_id(query, model, settings["sampling_id"], i),
                "query_id": query,
                "source": source, "model_id": model, "sampling_id": settings["sampling_id"], "sample_index": i,
                "seed": i, "prompt_token_ids": [257, 65, 259, 258], "token_ids": [*text.encode(), 259],
                "logprobs": [-1.0] * (len(text.encode()) + 1), "text": text,
                "finish_reason": "length" if text.endswith("~") else "stop",
            } | more)  # fmt: skip
    inputs = [input_of(run.lake, "queries", slice_name, run.lake.snapshot())]
    version = content_version([r["sample_id"] for r in rows])
    run.commit(
        "student_samples", slice_name, [Write("samples", pl.DataFrame(rows))], inputs=inputs, data_version=version
    )


def exact(prompt, answer, split="train"):
    return (prompt, answer, "exact", "{}", split)


def test_pairs_scores_and_rejections_with_their_lineage(open_run):
    run = open_run(sampling=FOUR)
    one, two, three, four = put_queries(run, [exact("1+1", "2"), exact("2+2", "4"), exact("3+3", "6"),
                                              ("free", None, None, None, "train")])  # fmt: skip
    put_samples(run, {one: ["2", "3", "2", "5"], two: ["4"] * 4, three: ["6~", "1", "2", "3"], four: ["w"] * 4})
    report = materialise(run, "a")
    pairs = run.lake.sql("SELECT * FROM pairs")
    texts = dict(run.lake.sql("SELECT sample_id, text FROM samples").iter_rows())
    assert [(texts[p["chosen_id"]], p["query_id"]) for p in pairs.to_dicts()] == [("2", one)]
    assert pairs["margin"].to_list() == [1.0]
    reasons = dict(run.lake.sql("SELECT query_id, reason FROM rejections").iter_rows())
    assert reasons == {two: "all_correct", three: "all_wrong", four: "unscored"}  # '6~' is not '6'
    assert asdict(report) | {"snapshot": 0, "data_version": ""} == {
        "asset": "filtered_pairs", "slice": "a", "snapshot": 0, "data_version": "", "rows": 1, "new_rows": 13,
        "n_pairs": 1, "new_scores": 12, "n_responses": 16, "n_queries": 4, "n_queries_with_pairs": 1,
        "rejected": {"all_correct": 1, "all_wrong": 1, "unscored": 1}, "mean_margin": 1.0,
        "mean_scores": {"verifier": 0.5}, "student_pass_rate": 0.5}  # fmt: skip
    commit = latest_materialisation(run.lake, "filtered_pairs", "a")
    assert commit["materialisation_id"] == pairs["materialisation_id"].item()
    assert {i["asset"] for i in json.loads(commit["inputs"])} == {"queries", "student_samples"}
    assert report.data_version == content_version(pairs["pair_id"].to_list())
    states = {s.asset: s.state for s in status(run.lake, run.profile)}
    assert states["filtered_pairs"] == "fresh"


def test_again_scores_nothing_and_leaves_the_rows_alone(open_run):
    run = open_run(sampling=FOUR)
    (one,) = put_queries(run, [exact("1+1", "2")])
    put_samples(run, {one: ["2", "3", "4", "5"]})
    first = materialise(run, "a")
    owners = "SELECT materialisation_id FROM pairs UNION ALL SELECT materialisation_id FROM scores ORDER BY ALL"
    before = run.lake.sql(owners)
    again = materialise(run, "a")
    assert (first.new_rows, again.new_rows, again.rows) == (5, 0, 1)
    assert again.data_version == first.data_version
    assert run.lake.sql(owners).equals(before)


def test_only_responses_of_the_latest_sampling_of_training_queries_count(open_run):
    run = open_run(sampling={**FOUR, "n_student": 2, "n_teacher": 2})
    train, held_out = put_queries(run, [exact("1+1", "2"), exact("2+2", "4", "eval")])
    put_samples(run, {train: ["old", "2", "beyond n"], held_out: ["4", "x"]})
    put_samples(run, {train: ["other policy"]}, model_id="other", sample_id="o1")
    put_samples(run, {train: ["other settings"]}, sampling_id="other", sample_id="o2")
    put_samples(run, {train: ["2", "taught", "beyond n"]}, source="teacher")
    found = current_samples(run.lake, "a", run.lake.snapshot())
    assert sorted(zip(found["source"], found["text"], strict=True)) == [
        ("student", "2"), ("student", "old"), ("teacher", "2"), ("teacher", "taught")]  # fmt: skip
    materialise(run, "a")
    assert run.lake.sql("SELECT count(*) FROM scores").item() == 4


def test_responses_follow_a_query_whose_slice_was_renamed(open_run):
    run = open_run(sampling=FOUR)
    (one,) = put_queries(run, [exact("1+1", "2")], slice_name="old")
    put_samples(run, {one: ["2", "3", "4", "5"]}, slice_name="old")
    materialise(run, "old")
    put_queries(run, [exact("1+1", "2")], slice_name="new")
    put_samples(run, {one: ["2", "3", "4", "5"]}, slice_name="new")  # already there, as slice 'old'
    assert run.lake.sql("SELECT DISTINCT slice FROM samples").item() == "old"
    report = materialise(run, "new")
    assert (report.n_responses, report.n_pairs, report.new_scores) == (4, 1, 0)


def test_a_corrected_answer_is_scored_again(open_run):
    run = open_run(sampling=FOUR)
    (one,) = put_queries(run, [exact("1+1", "3")])
    put_samples(run, {one: ["2", "3", "4", "5"]})
    materialise(run, "a")
    put_queries(run, [exact("1+1", "2")])
    assert materialise(run, "a").new_scores == 4
    texts = dict(run.lake.sql("SELECT sample_id, text FROM samples").iter_rows())
    assert [texts[i] for i in run.lake.sql("SELECT chosen_id FROM pairs")["chosen_id"]] == ["2"]


def test_no_pair_at_all_is_an_error_that_counts_reasons_and_keeps_scores_and_older_pairs(open_run):
    run = open_run(sampling=FOUR)
    one, two = put_queries(run, [exact("1+1", "2"), exact("2+2", "4")])
    put_samples(run, {one: ["2", "3", "4", "5"], two: ["4"] * 4})
    materialise(run, "a")
    pairs = run.lake.sql("SELECT * FROM pairs")
    put_queries(run, [exact("1+1", "none"), exact("2+2", "4")])
    message = (
        "none of 2 queries gave a pair, 8 responses. 1 all_correct: use harder queries.*1 all_wrong: use easier queries"
    )
    with pytest.raises(NoPairsError, match=message):
        materialise(run, "a")
    assert run.lake.sql("SELECT * FROM pairs").equals(pairs)
    assert run.lake.sql("SELECT count(*) FROM scores").item() == 12


def test_a_broken_verifier_names_the_query(open_run):
    run = open_run(sampling=FOUR)
    args = json.dumps({"dataset": "word_sorting"})
    (one,) = put_queries(run, [("sort b a", "a b", "reasoning_gym", args, "train")])
    put_samples(run, {one: ["a b", "b a", "", "c"]})
    with pytest.raises(verifiers.SpecError, match=f"query {one}: .*metadata"):
        materialise(run, "a")


def test_a_crash_while_scoring_loses_one_chunk_at_most(open_run, monkeypatch):
    run = open_run(sampling=FOUR)
    one, two = put_queries(run, [exact("1+1", "2"), exact("2+2", "4")])
    put_samples(run, {one: ["2", "3", "4", "5"], two: ["1", "4", "6", "7"]})
    monkeypatch.setattr(scorers, "CHUNK", 3)
    real, calls = verifiers.verify, []

    def crashes_at_the_eighth(*args):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(verifiers, "verify", crashes_at_the_eighth)
    with pytest.raises(KeyboardInterrupt):
        materialise(run, "a")
    assert run.lake.sql("SELECT count(*) FROM scores").item() == 6
    assert latest_materialisation(run.lake, "filtered_pairs", "a") is None
    report = materialise(run, "a")
    assert (report.new_scores, report.n_pairs, len(calls)) == (2, 2, 10)


def test_teacher_loglik_is_the_mean_log_probability_of_the_response_tokens(open_run):
    run = open_run(sampling=FOUR, preference={"weights": {"teacher_loglik": 1.0}, "min_margin": 1e-6},
                   teacher={"chunk_samples": 3, "batch_tokens": 40})  # fmt: skip
    one, two = put_queries(run, [("free", None, None, None, "train"), exact("1+1", "2")])
    put_samples(run, {one: ["short", "a much longer response", "é", ""], two: ["2", "3", "22", "x"]})
    report = materialise(run, "a")
    model = AutoModelForCausalLM.from_pretrained(run.profile.models.teacher, dtype=torch.float64)
    stored = run.lake.sql("SELECT score, prompt_token_ids, token_ids FROM scores JOIN samples USING (sample_id)")
    assert stored.height == 8
    for score, prompt, tokens in stored.iter_rows():
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0].double()
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])
        assert score == pytest.approx(logps.mean().item(), abs=1e-5)
    assert run.lake.sql("SELECT count(DISTINCT scorer_id) FROM scores").item() == 1
    assert report.student_pass_rate is None
    assert materialise(run, "a").new_rows == 0


def test_before_sampling_there_is_a_clear_error(open_run):
    run = open_run(sampling=FOUR)
    put_queries(run, [exact("1+1", "2")])
    with pytest.raises(LookupError, match=r"student_samples\[a\] has not been materialised"):
        materialise(run, "a")
