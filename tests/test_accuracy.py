"""Intervals, the summary and the promotion gate, against figures worked out elsewhere."""

import time
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from nbg_core.evaluation.accuracy import summarise
from nbg_core.evaluation.intervals import mcnemar_p_value, paired_difference, wilson
from nbg_core.evaluation.promotion import gate_refusal, promotion_blocker
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Input, Record, Write
from nbg_core.scorers.verifiers import scorer_ids


def test_wilson_against_published_values():
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                                    (1, 29, 0.0061, 0.1718)]:  # fmt: skip
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_interval_of_a_paired_difference_inverts_a_likelihood_found_by_search():
    """The score test with its nuisance parameter found on a grid, not by Tango's closed form; and its interval."""

    def score(fixed: int, broken: int, n: int, difference: float) -> float:
        low = max(0.0, -difference)
        grid = np.linspace(low, (1 - difference) / 2, 200_001)[1:-1]  # share of broken queries; fixed: + difference
        with np.errstate(divide="ignore", invalid="ignore"):
            same = (n - fixed - broken) * np.log(1 - 2 * grid - difference)
            likelihood = broken * np.log(grid) + fixed * np.log(grid + difference) + same
        q = grid[np.nanargmax(likelihood)]
        return (fixed - broken - n * difference) / np.sqrt(n * (2 * q + difference * (1 - difference)))

    for fixed, broken, n in [(5, 1, 10), (1, 7, 40), (3, 3, 12), (60, 20, 250), (9, 2, 11)]:
        low, high = paired_difference(fixed, broken, n)
        assert low < (fixed - broken) / n < high
        assert score(fixed, broken, n, low) == pytest.approx(1.96, abs=2e-3)
        assert score(fixed, broken, n, high) == pytest.approx(-1.96, abs=2e-3)


def test_the_interval_of_a_paired_difference_at_its_limits():
    assert paired_difference(0, 0, 0) == (-1.0, 1.0)
    low, high = paired_difference(1, 0, 1)
    assert low < 0 and high == pytest.approx(1.0)
    low, high = paired_difference(0, 0, 30)
    assert low == pytest.approx(-high) and 0 < high < 0.15
    for fixed, broken, n in [(4, 1, 9), (0, 3, 3), (12, 5, 40)]:
        mirrored = tuple(-x for x in reversed(paired_difference(broken, fixed, n)))
        assert paired_difference(fixed, broken, n) == pytest.approx(mirrored, abs=1e-9)


def test_mcnemars_test_against_counted_tosses():
    for fixed in range(7):
        for broken in range(7):
            n = fixed + broken
            tosses = [bin(i).count("1") for i in range(2**n)]  # heads of every sequence of n tosses
            extreme = sum(abs(2 * heads - n) >= abs(fixed - broken) for heads in tosses)
            assert mcnemar_p_value(fixed, broken) == pytest.approx(extreme / 2**n)


def test_mcnemars_test_of_thousands_of_changed_answers_is_quick():
    start = time.monotonic()
    assert mcnemar_p_value(5100, 4900) == pytest.approx(0.0466, abs=1e-4)  # by math.comb, in 43 s
    assert time.monotonic() - start < 2


@pytest.fixture
def lake(tmp_path):
    lake = Lake(f"sqlite:{tmp_path}/catalog.sqlite", str(tmp_path / "files"))
    lake.create()
    return lake


def fill(lake: Lake, answers: dict[str, dict[str, list[bool]]], splits: dict[str, str] | None = None) -> None:
    """answers[slice][role] -> correct per query."""
    queries, rows = [], []
    for slice_name, roles in answers.items():
        for i in range(len(next(iter(roles.values())))):
            q = f"{slice_name}{i}"
            queries.append({"slice": slice_name, "query_id": q, "split": (splits or {}).get(q, "eval"), "messages": [],
                            "prompt": "", "answer": "1", "verifier": "exact", "verifier_args": "{}", "source_file": "",
                            "source_line": 1})  # fmt: skip
            rows += [{"model_id": role, "query_id": q, "settings_id": "s", "scorer_id": RIGHT, "slice": slice_name,
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
    summary = summarise(lake, "s", ROLES)
    assert summary["slice"].to_list() == ["a", "b", "overall"]
    a, _, overall = summary.to_dicts()
    assert (a["n"], a["before"], a["after"], a["teacher"]) == (10, 0.4, 0.8, 1.0)
    # three right twice, one broken, five fixed, one wrong twice
    assert (a["fixed"], a["broken"], a["difference"]) == (5, 1, pytest.approx(0.4))
    assert (a["difference_low"], a["difference_high"]) == paired_difference(5, 1, 10)
    assert (overall["n"], overall["before"]) == (15, pytest.approx(4 / 15))


def test_queries_that_are_not_held_out_any_more_do_not_count(lake):
    fill(lake, {"a": {r: [True, False] for r in ROLES}}, splits={"a1": "train"})
    assert summarise(lake, "s", ROLES)["n"].to_list() == [1, 1]


def test_answers_judged_by_an_answer_that_was_corrected_since_do_not_count(lake):
    fill(lake, {"a": {r: [True, False] for r in ROLES}})
    with lake.connect(read_only=False) as con:
        con.execute("UPDATE queries SET answer = '2' WHERE query_id = 'a1'")
    assert summarise(lake, "s", ROLES)["after"].to_list() == [1.0, 1.0]
    with lake.connect(read_only=False) as con:
        con.execute("UPDATE queries SET answer = '2'")
    with pytest.raises(LookupError, match="materialise student_eval again"):
        summarise(lake, "s", ROLES)


def summary(*rows: tuple[str, int, int, int]) -> pl.DataFrame:
    """Rows of slice, n, fixed, broken; the last row is the total."""
    return pl.DataFrame([
        {"slice": s, "is_overall": i == len(rows) - 1, "n": n, "fixed": f, "broken": b, "difference": (f - b) / n}
        for i, (s, n, f, b) in enumerate(rows)
    ])  # fmt: skip


def test_the_gate():
    good = ("overall", 200, 30, 5)
    assert gate_refusal(summary(("a", 100, 5, 5), good), 20) is None
    assert "not better overall: difference +0.050 (20 of 200 queries fixed, 10 broken, p = 0.099)" in gate_refusal(
        summary(("a", 100, 20, 5), ("overall", 200, 20, 10)), 20
    )
    assert "not better overall" in gate_refusal(summary(("a", 100, 0, 20), ("overall", 200, 5, 30)), 20)
    assert "slice a is worse: difference -0.150" in gate_refusal(summary(("a", 100, 0, 15), good), 20)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_a_few_queries_that_all_flip_prove_nothing(n):
    assert "not better overall" in gate_refusal(summary(("a", n, n, 0), ("overall", n, n, 0)), 1)
    assert f"only {n} held-out queries were answered" in gate_refusal(summary(("a", n, n, 0), ("overall", n, n, 0)), 20)
    fifty_fixed = ("overall", 100, 50, n)
    assert gate_refusal(summary(("a", 90, 50, 0), ("b", n, 0, n), fifty_fixed), 20) is None, "b is noise"


def test_six_flips_of_six_are_the_fewest_that_pass():
    assert gate_refusal(summary(("a", 6, 6, 0), ("overall", 6, 6, 0)), 6) is None


def test_with_many_slices_one_that_looks_worse_by_chance_does_not_count():
    worse, good = ("x", 20, 0, 6), ("overall", 500, 100, 6)  # p = 0.031: below 0.05, but not below 0.05 / 10
    assert "slice x is worse" in gate_refusal(summary(worse, good), 20)
    others = [(f"s{i}", 50, 10, 0) for i in range(9)]
    assert gate_refusal(summary(worse, *others, good), 20) is None


def test_a_slice_called_overall_is_a_slice(lake):
    right, wrong = [True] * 30, [False] * 30
    fill(lake, {"overall": {"before": right, "after": wrong, "teacher": right},
                "z": {"before": wrong * 4, "after": right * 4, "teacher": right * 4}})  # fmt: skip
    table = summarise(lake, "s", ROLES)
    assert table.select("slice", "is_overall", "n").rows() == [
        ("overall", False, 30), ("z", False, 120), ("overall (all slices)", True, 150)]  # fmt: skip
    assert "slice overall is worse" in gate_refusal(table, 20)


def test_a_checkpoint_whose_evaluation_says_no_is_objected_to_also_after_another_was_evaluated(lake):
    with pytest.raises(LookupError, match="no checkpoint 'after'"):
        promotion_blocker(lake, "after", 20)
    fill(lake, {"a": {"before": [True] * 20, "after": [False] * 20, "teacher": [True] * 20}})
    rows = [
        {"checkpoint_id": c, "training_id": c, "path": c, "parent_model_id": "before", "teacher_model_id": "teacher",
         "input_snapshot": 1, "n_pairs": 1, "n_steps": 1, "settings": "{}", "created_at": datetime.now(UTC)}
        for c in ("after", "other")
    ]  # fmt: skip
    lake.commit(Record("x", None, "r", "t"), [Write("checkpoints", pl.DataFrame(rows))])
    read = Input("student_checkpoint", None, "after", lake.snapshot())
    settings = {"answering_id": "s", "teacher": "teacher"}
    assert promotion_blocker(lake, "after", 20) is None, "it was never evaluated"
    lake.commit(Record("student_eval", None, "r", "t", settings=settings, inputs=[read], data_version="v"))
    assert "not better overall: difference -1.000" in promotion_blocker(lake, "aft", 20)
    assert promotion_blocker(lake, "other", 20) is None
    read = Input("student_checkpoint", None, "other", lake.snapshot())
    lake.commit(Record("student_eval", None, "r", "t", settings=settings, inputs=[read], data_version="w"))
    assert "not better overall: difference -1.000" in promotion_blocker(lake, "aft", 20)
    with lake.connect(read_only=False) as con:
        con.execute("DELETE FROM evaluations")
    with pytest.raises(LookupError, match="materialise student_eval again"):
        promotion_blocker(lake, "other", 20)
