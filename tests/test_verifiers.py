"""Verifiers: what is right, what is wrong, what takes too long, and which specifications cannot work."""

import math
import signal
import threading
import time

import pytest
from reasoning_gym.factory import create_dataset

from nbg_core.scorers import verifiers
from nbg_core.scorers.verifiers import SpecError, check_spec, verify


@pytest.mark.parametrize(
    ("verifier", "answer", "args", "right", "wrong"),
    [
        ("exact", " Paris\n", {}, [" Paris\n", "Paris"], ["paris", "Paris.", "", "in Paris"]),
        ("exact", "Paris", {"case_sensitive": False}, ["PARIS", " paris "], ["Pari"]),
        ("regex", "4[0-9]", {}, ["42", " 49\n"], ["412", "x42", ""]),
        ("regex", None, {"pattern": "(?i)yes\\.?"}, ["Yes.", "YES"], ["yes, no"]),
        ("regex", "what a human reads", {"pattern": "a+"}, ["aaa"], ["what a human reads"]),
        ("math_verify", "1/2", {}, ["0.5", "so it is $\\frac{1}{2}$", "\\boxed{\\frac{2}{4}}"], ["2", "", "none"]),
        ("math_verify", "3\\sqrt{2}", {}, ["$\\sqrt{18}$"], ["3", "$3$"]),
        ("math_verify", "$x^2+2x+1$", {}, ["$(x+1)^2$"], ["$x^2$"]),
        ("math_verify", "1,234", {}, ["1234"], ["1", "234"]),
    ],
)
def test_right_scores_1_and_wrong_scores_0(verifier, answer, args, right, wrong):
    check_spec(answer, verifier, args, "q")
    assert [verify(t, answer, verifier, args, "q") for t in right] == [1.0] * len(right)
    assert [verify(t, answer, verifier, args, "q") for t in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize("dataset", ["chain_sum", "number_sorting", "leg_counting", "word_sorting", "countdown"])
def test_reasoning_gym_scores_its_own_answers_1_and_other_texts_less(dataset):
    for entry in create_dataset(dataset, size=3, seed=5):
        args = {"dataset": dataset, "metadata": entry["metadata"]}
        check_spec(entry["answer"], "reasoning_gym", args, entry["question"])
        assert verify(f" {entry['answer']}\n", entry["answer"], "reasoning_gym", args, entry["question"]) == 1.0
        for other in ("", "I do not know", "\x00\ud7ff" * 50):
            score = verify(other, entry["answer"], "reasoning_gym", args, entry["question"])
            assert 0.0 <= score < 1.0


def test_a_partial_score_is_kept():
    args = {"dataset": "word_sorting", "metadata": {"sorted_words": ["ab", "cd"], "direction": "ascending"}}
    assert verify("cd, ab", "ab, cd", "reasoning_gym", args, "q") == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("answer", "verifier", "args", "message"),
    [
        ("5", "exactt", {}, "unknown verifier 'exactt'; did you mean 'exact'"),
        (None, "exact", {}, "exact needs an 'answer'"),
        (None, "math_verify", {}, "math_verify needs an 'answer'"),
        ("", "math_verify", {}, "no mathematical expression; use verifier 'exact'"),
        ("5", "exact", {"casesensitive": True}, "takes no 'casesensitive'; did you mean 'case_sensitive'"),
        ("5", "exact", {"case_sensitive": "no"}, "case_sensitive = 'no' must be of type bool"),
        ("5", "math_verify", {"x": 1}, "math_verify takes no 'x'; known: none"),
        (None, "regex", {}, "needs verifier_args with a 'pattern'"),
        ("(", "regex", {}, r"'\(' is not a regular expression: .*position 0"),
        ("5", "reasoning_gym", {}, "needs verifier_args with a 'dataset'"),
        ("5", "reasoning_gym", {"dataset": "chain_sun"}, "unknown reasoning_gym dataset 'chain_sun'; .*'chain_sum'"),
        ("5", "reasoning_gym", {"dataset": "composite"}, "'composite' has no scorer of its own"),
        ("5", "reasoning_gym", {"dataset": "chain_sum", "metadata": []}, "metadata = .* must be of type dict"),
        ("[1]", "reasoning_gym", {"dataset": "word_sorting"}, "fails on the reference answer .*KeyError.*metadata"),
    ],
)
def test_a_specification_that_cannot_work_is_refused_by_check_and_by_verify(answer, verifier, args, message):
    with pytest.raises(SpecError, match=message):
        check_spec(answer, verifier, args, "q")
    with pytest.raises(SpecError, match=message):
        verify("some response", answer, verifier, args, "q")


def test_a_scorer_that_fails_on_a_strange_response_scores_0(monkeypatch):
    def scorer(text, entry):
        return 1.0 if text == entry["answer"] else text.index("not there")

    monkeypatch.setattr(verifiers, "_dataset_scorer", lambda dataset: scorer)
    assert verify("strange", "5", "reasoning_gym", {"dataset": "any"}, "q") == 0.0
    assert verify("5", "5", "reasoning_gym", {"dataset": "any"}, "q") == 1.0


@pytest.mark.parametrize(
    ("text", "answer", "verifier", "args"),
    [
        ("9**9**9**9", "5", "math_verify", {}),
        ("$(10^9)!$", "5", "math_verify", {}),
        ("a" * 40 + "b", None, "regex", {"pattern": "(a+)+"}),
    ],
)
def test_a_response_that_takes_too_long_scores_0_and_the_alarm_is_put_back(monkeypatch, text, answer, verifier, args):
    monkeypatch.setattr(verifiers, "TIME_LIMIT", 0.3)
    verify("1", "5", "math_verify", {}, "q")  # first use imports sympy
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    began = time.monotonic()
    assert verify(text, answer, verifier, args, "q") == 0.0
    assert time.monotonic() - began < 3
    assert signal.getsignal(signal.SIGALRM) is handler
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer[0] > 0)


def test_an_alarm_while_the_alarm_is_put_back_is_harmless(monkeypatch):
    """The body ends just within the limit; the signal is delivered when timer and handler are being put back."""
    verify("1", "1", "exact", {}, "q")
    handler, set_timer, calls = signal.getsignal(signal.SIGALRM), signal.setitimer, []

    def late(which, seconds, interval=0.0):
        calls.append(seconds)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGALRM)
        return set_timer(which, seconds, interval)

    monkeypatch.setattr(verifiers.signal, "setitimer", late)
    before = signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert verify("1", "1", "exact", {}, "q") == 1.0
    assert len(calls) == 3 and signal.getsignal(signal.SIGALRM) is handler
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == before


@pytest.mark.parametrize(("score", "expected"), [(math.nan, 0.0), (math.inf, 0.0), (-3, 0.0), (0.25, 0.25), (7, 1.0)])
def test_a_score_is_a_number_from_0_to_1(monkeypatch, score, expected):
    monkeypatch.setattr(verifiers, "_dataset_scorer", lambda dataset: lambda text, entry: score)
    assert verify("5", "5", "reasoning_gym", {"dataset": "any"}, "q") == expected


def test_a_reference_answer_that_takes_too_long_is_a_fault_of_the_query(monkeypatch):
    monkeypatch.setattr(verifiers, "TIME_LIMIT", 0.1)
    monkeypatch.setattr(verifiers, "_dataset_scorer", lambda dataset: lambda text, entry: time.sleep(30))
    with pytest.raises(SpecError, match="fails on the reference answer '5': TimedOut: no verdict within 0.1 s"):
        check_spec("5", "reasoning_gym", {"dataset": "any"}, "q")


def test_outside_the_main_thread_there_is_a_clear_error():
    errors = []

    def work():
        try:
            verify("5", "5", "math_verify", {}, "q")
        except RuntimeError as e:
            errors.append(str(e))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors and "main thread" in errors[0]
