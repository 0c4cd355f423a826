"""Intervals, the summary and the promotion gate, against figures worked out elsewhere."""

import math
from datetime import UTC, datetime

import polars as pl
import pytest

from nbg_core import accuracy
from nbg_core.lake import Input, Lake, Record, Write
from nbg_core.preference.verifiers import scorer_ids


def test_wilson_against_published_values():
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                                    (1, 29, 0.0061, 0.1718)]:  # fmt: skip
        assert accuracy.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_says_nothing():
    assert accuracy.wilson(0, 0) == (0.0, 1.0)


@pytest.fixture
def lake(tmp_path):
    lake = Lake(f"sqlite:{tmp_path}/catalog.sqlite", str(tmp_path / "files"))
    lake._create()
    return lake


def fill(lake: Lake, answers: dict[str, dict[str, list[bool]]], splits: dict[str, str] | None = None) -> None:
    """answers[slice][role] -> correct per query."""
    queries, rows = [], []
    for slice, roles in answers.items():
        for i in range(len(next(iter(roles.values())))):
            q = f"{slice}{i}"
            queries.append({"slice": slice, "query_id": q, "split": (splits or {}).get(q, "eval"), "messages": [],
                            "prompt": "", "answer": "1", "verifier": "exact", "verifier_args": "{}", "source_file": "",
                            "source_line": 1})  # fmt: skip
            rows += [{"model_id": role, "query_id": q, "settings_id": "s", "scorer_id": RIGHT, "slice": slice,
                      "score": float(c[i]), "correct": c[i], "text": "", "finish_reason": "stop"}
                     for role, c in roles.items()]  # fmt: skip
    lake.commit(Record("x", None, "r", "t"), [
        Write("queries", pl.DataFrame(queries, schema_overrides={
            "messages": pl.List(pl.Struct({"role": pl.String, "content": pl.String})), "answer": pl.String,
            "verifier": pl.String, "verifier_args": pl.String})),
        Write("evaluations", pl.DataFrame(rows))])  # fmt: skip


RIGHT = scorer_ids(pl.DataFrame({"verifier": "exact", "answer": "1", "verifier_args": "{}"})).item()
ROLES = {"before": "before", "after": "after", "teacher": "teacher"}


def test_summary_is_paired_per_slice_and_overall(lake):
    before, after = [True] * 4 + [False] * 6, [True] * 3 + [False] + [True] * 5 + [False]
    fill(lake, {"a": {"before": before, "after": after, "teacher": [True] * 10},
                "b": {"before": [False] * 5, "after": [True] * 5, "teacher": [True] * 5}})  # fmt: skip
    summary = accuracy.summarise(lake, "s", ROLES)
    assert summary["slice"].to_list() == ["a", "b", "overall"]
    a, _, overall = summary.to_dicts()
    assert (a["n"], a["before"], a["after"], a["teacher"]) == (10, 0.4, 0.8, 1.0)
    # differences: three 0 (right, right), one -1, five +1, one 0: mean 0.4
    deviation = math.sqrt(sum((d - 0.4) ** 2 for d in [0] * 4 + [-1] + [1] * 5) / 9)
    assert a["difference"] == pytest.approx(0.4)
    assert a["difference_high"] - 0.4 == pytest.approx(1.959964 * deviation / math.sqrt(10))
    assert (overall["n"], overall["before"]) == (15, pytest.approx(4 / 15))


def test_queries_that_are_not_held_out_any_more_do_not_count(lake):
    fill(lake, {"a": {r: [True, False] for r in ROLES}}, splits={"a1": "train"})
    assert accuracy.summarise(lake, "s", ROLES)["n"].to_list() == [1, 1]


def test_answers_judged_by_an_answer_that_was_corrected_since_do_not_count(lake):
    fill(lake, {"a": {r: [True, False] for r in ROLES}})
    with lake.connect(read_only=False) as con:
        con.execute("UPDATE queries SET answer = '2' WHERE query_id = 'a1'")
    assert accuracy.summarise(lake, "s", ROLES)["after"].to_list() == [1.0, 1.0]
    with lake.connect(read_only=False) as con:
        con.execute("UPDATE queries SET answer = '2'")
    with pytest.raises(LookupError, match="materialise student_eval again"):
        accuracy.summarise(lake, "s", ROLES)


def summary(*rows: tuple[str, float, float, float]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["slice", "difference_low", "difference", "difference_high"], orient="row")


def test_the_gate():
    good = ("overall", 0.02, 0.1, 0.18)
    assert accuracy.gate(summary(("a", -0.1, 0.0, 0.1), good)) is None
    assert "not better overall" in accuracy.gate(summary(("a", 0.1, 0.2, 0.3), ("overall", 0.0, 0.1, 0.2)))
    assert "slice a is worse" in accuracy.gate(summary(("a", -0.3, -0.2, -0.1), good))


def test_a_checkpoint_whose_evaluation_says_no_is_objected_to_also_after_another_was_evaluated(lake):
    assert accuracy.objection(lake, "after") is None  # nothing is evaluated
    fill(lake, {"a": {"before": [True] * 20, "after": [False] * 20, "teacher": [True] * 20}})
    rows = [
        {"checkpoint_id": c, "training_id": c, "path": c, "parent_model_id": "before", "teacher_model_id": "teacher",
         "input_snapshot": 1, "n_pairs": 1, "n_steps": 1, "settings": "{}", "created_at": datetime.now(UTC)}
        for c in ("after", "other")
    ]  # fmt: skip
    lake.commit(Record("x", None, "r", "t"), [Write("checkpoints", pl.DataFrame(rows))])
    read = Input("student_checkpoint", None, "after", lake.snapshot())
    settings = {"answering_id": "s", "teacher": "teacher"}
    lake.commit(Record("student_eval", None, "r", "t", settings=settings, inputs=[read], data_version="v"))
    assert "not better overall: difference -1.000" in accuracy.objection(lake, "aft")
    assert accuracy.objection(lake, "other") is None
    read = Input("student_checkpoint", None, "other", lake.snapshot())
    lake.commit(Record("student_eval", None, "r", "t", settings=settings, inputs=[read], data_version="w"))
    assert "not better overall: difference -1.000" in accuracy.objection(lake, "aft")
