"""Verifiers: rules that say whether a response is right, as a score in [0, 1]. A verifier is one entry of VERIFIERS.

A response on which a verifier fails, or takes longer than TIME_LIMIT seconds, scores 0. A specification that no
response could satisfy (unknown name, bad arguments, a verifier that fails on the reference answer) is a SpecError; when
queries are ingested, `check_spec` raises it. The time limit is an alarm signal, so `verify` must be called in the main
thread of a process, as workers do.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import polars as pl

from nbg_core.base.ids import digest
from nbg_core.base.names import nearest

VERSION = "1"
"""Part of the scorer_id of every verifier. Increment it when a verifier changes its scores: all responses are then
verified again."""

TIME_LIMIT = 5.0
"""Seconds that a verifier may take for one response."""


class SpecError(ValueError):
    """A query's verifier, answer or verifier_args cannot work; the message names the field and the remedy."""


class _TimedOut(BaseException):
    """A verifier reached its time limit. It is not an Exception, so that `except Exception` in a library misses it."""


@dataclass(frozen=True)
class Verifier:
    """A way to check a response against a query's `answer` and `verifier_args`."""

    name: str
    """Value of `verifier` in a query file."""
    meaning: str
    """When a response is right."""
    score: Callable[[str, Any, dict[str, Any], str], float]
    """(stripped response, answer, verifier_args, prompt) -> score in [0, 1]. The answer may be None unless
    `needs_answer`. It runs under the time limit."""
    arguments: Mapping[str, type] = field(default_factory=dict)
    """Name -> type of the arguments that it takes in `verifier_args`."""
    required: tuple[str, ...] = ()
    """Names of the arguments that it cannot do without."""
    needs_answer: bool = False
    """Whether the query must have an `answer`."""
    check: Callable[[str | None, dict[str, Any], str], object] = lambda answer, args, prompt: None
    """(answer, verifier_args, prompt) -> anything; raises for values that cannot work. It runs under the time limit."""
    load: Callable[[dict[str, Any]], object] = lambda args: None
    """(verifier_args) -> anything; imports what the verifier needs. It runs before the time limit starts, because an
    interrupted import would leave a broken module."""
    remedy: str = "simplify it"
    """What a user should do when `check` fails on the reference answer."""


def verify(text: str, answer: str | None, verifier: str, args: dict[str, Any], prompt: str) -> float:
    """The score in [0, 1] of a response.

    Raises SpecError when the fault is the query's, RuntimeError outside the main thread."""
    found = _ready(answer, verifier, args)
    try:
        with _time_limit():
            score = float(found.score(text.strip(), answer, args, prompt))
        return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0
    except SpecError:
        raise
    except (Exception, _TimedOut):  # a library may raise anything on a strange response
        _check(found, answer, args, prompt)
        return 0.0


def check_spec(answer: str | None, verifier: str, args: dict[str, Any], prompt: str) -> None:
    """Raise SpecError if no response could be verified with this answer, verifier and arguments."""
    _check(_ready(answer, verifier, args), answer, args, prompt)


def scorer_ids(queries: pl.DataFrame) -> pl.Series:
    """Series `scorer_id` of frame `queries`: hash of what a score depends on besides the response, which is verifier,
    answer and verifier_args."""
    rows = queries.select("verifier", "answer", "verifier_args").iter_rows()
    return pl.Series("scorer_id", [digest("verifier", VERSION, *row) for row in rows], dtype=pl.String)


def _ready(answer: str | None, verifier: str, args: dict[str, Any]) -> Verifier:
    """The verifier, ready to score. Raises SpecError if its name, its arguments or a missing answer are at fault."""
    if verifier not in VERIFIERS:
        raise SpecError(f"unknown verifier {verifier!r}; {nearest(verifier, VERIFIERS)}")
    found = VERIFIERS[verifier]
    for name, value in args.items():
        if name not in found.arguments:
            raise SpecError(f"verifier_args: {verifier} takes no {name!r}; {nearest(name, found.arguments)}")
        if not isinstance(value, found.arguments[name]):
            raise SpecError(f"verifier_args: {name} = {value!r} must be of type {found.arguments[name].__name__}")
    if answer is None and found.needs_answer:
        raise SpecError(f"verifier {verifier} needs an 'answer'; add one, or remove the verifier")
    for name in found.required:
        if name not in args:
            raise SpecError(f"verifier {verifier} needs verifier_args with a {name!r}; add it")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a verifier was called outside the main thread, where its time limit cannot work; call it "
                           "in the main thread of a process")  # fmt: skip
    found.load(args)
    return found


def _check(verifier: Verifier, answer: str | None, args: dict[str, Any], prompt: str) -> None:
    """Raise SpecError if the verifier fails on the reference answer itself (for missing metadata, say)."""
    try:
        with _time_limit():
            verifier.check(answer, args, prompt)
    except SpecError:
        raise
    except (Exception, _TimedOut) as e:
        raise SpecError(
            f"verifier {verifier.name} fails on the reference answer {answer!r}: {type(e).__name__.strip('_')}: {e}; "
            f"{verifier.remedy}"
        ) from e


@contextmanager
def _time_limit():
    """Raise _TimedOut in the body of the `with` after TIME_LIMIT seconds, and then every second until the body ends."""

    def stop(signum, frame):
        raise _TimedOut(f"no verdict within {TIME_LIMIT:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT, 1.0)
    try:
        yield
    finally:
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, *timer)
                signal.signal(signal.SIGALRM, handler)
                break
            except _TimedOut:  # the alarm came after the body had ended: timer and handler are put back all the same
                continue


def _exact(text: str, answer: str, args: dict, prompt: str) -> float:
    answer = answer.strip()
    if args.get("case_sensitive", True):
        return text == answer
    return text.casefold() == answer.casefold()


def _regex(text: str, answer: str | None, args: dict, prompt: str) -> float:
    return _pattern(answer, args).fullmatch(text) is not None


def _pattern(answer: str | None, args: dict) -> re.Pattern:
    pattern = args.get("pattern", answer)
    if pattern is None:
        raise SpecError("verifier regex needs verifier_args with a 'pattern', or an 'answer' to take as one")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise SpecError(f"{pattern!r} is not a regular expression: {e}; correct it, or use verifier 'exact'") from e


def _math_verify(text: str, answer: str, args: dict, prompt: str) -> float:
    from math_verify import parse
    from math_verify import verify as same

    gold = _gold(answer)
    # math_verify's own time limits are switched off, because they use the same alarm signal as _time_limit.
    return same(gold, parse(text, parsing_timeout=None), timeout_seconds=None)


@lru_cache(maxsize=4096)
def _gold(answer: str) -> list:
    from math_verify import parse

    for name in ("math_verify.parser", "math_verify.grader"):  # both warn that their own time limit is off
        logging.getLogger(name).setLevel(logging.ERROR)
    # Without delimiters math_verify would read only the first number of an answer: 3\sqrt{2} as 3.
    latex = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    gold = parse(latex, parsing_timeout=None)
    if not gold:
        raise SpecError(f"answer {answer!r} has no mathematical expression; use verifier 'exact'")
    return gold


def _load_math_verify(args: dict) -> None:
    import math_verify  # noqa: F401


def _reasoning_gym(text: str | None, answer: str | None, args: dict, prompt: str) -> float:
    entry = {"question": prompt, "answer": answer, "metadata": args.get("metadata", {})}
    return _dataset_scorer(args["dataset"])(text, entry)


@cache
def _dataset_scorer(dataset: str) -> Callable[[str | None, dict], float]:
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    if dataset not in DATASETS:
        raise SpecError(f"verifier_args: unknown reasoning_gym dataset {dataset!r}; {nearest(dataset, DATASETS)}")
    try:
        return get_score_answer_fn(dataset)
    except Exception as e:
        raise SpecError(
            f"verifier_args: reasoning_gym dataset {dataset!r} has no scorer of its own ({e}); name another dataset"
        ) from e


VERIFIERS: dict[str, Verifier] = {
    v.name: v
    for v in (
        Verifier("exact", "it equals the answer, apart from leading and trailing white space",
                 _exact, {"case_sensitive": bool}, needs_answer=True),
        Verifier("regex", "the pattern matches all of it (Python's re.fullmatch)",
                 _regex, {"pattern": str}, check=lambda answer, args, prompt: _pattern(answer, args)),
        Verifier("math_verify", "math-verify finds an expression in it that equals the answer",
                 _math_verify, needs_answer=True, check=lambda answer, args, prompt: _gold(answer),
                 load=_load_math_verify),
        Verifier("reasoning_gym", "the scorer of a reasoning-gym dataset says so; its partial scores are kept",
                  _reasoning_gym, {"dataset": str, "metadata": dict},
                 required=("dataset",), check=lambda answer, args, prompt: _reasoning_gym(answer, answer, args, prompt),
                 load=lambda args: _dataset_scorer(args["dataset"]),
                 remedy="give the entry's own answer and its whole metadata"),
    )
}  # fmt: skip
