"""Rule-based verifiers: is a response right, as a score in [0, 1].

| verifier | arguments (`verifier_args`) | right when |
|---|---|---|
| exact | case_sensitive (default true) | the stripped response is the stripped answer |
| regex | pattern (default: the answer) | the stripped response matches all of the pattern |
| math_verify | none | it is mathematically the answer, read as LaTeX (`$` around it is optional) |
| reasoning_gym | dataset, metadata (the entry's own) | that dataset's scorer says so, partial credit included |

A response that a verifier cannot digest, or not within TIME_LIMIT seconds, scores 0. A specification that no response
could satisfy (unknown name, bad arguments, a scorer that fails on the reference answer) is a SpecError: `check_spec`
finds it when queries are ingested. The time limit is an alarm signal, so `verify` runs in a process's main thread, as
every worker does.
"""

from __future__ import annotations

import difflib
import logging
import re
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import polars as pl

from nbg_core.ids import digest

VERSION = "1"
"""Raised when a verifier would score differently: everything scored before is then scored again."""

TIME_LIMIT = 5.0
"""Seconds a verifier may take over one response."""

ARGUMENTS = {
    "exact": {"case_sensitive": bool},
    "regex": {"pattern": str},
    "math_verify": {},
    "reasoning_gym": {"dataset": str, "metadata": dict},
}
"""Every verifier, and its arguments with their types."""


class SpecError(ValueError):
    """A query whose verifier cannot work: says which field is wrong and what to write instead."""


class _TimedOut(BaseException):
    """Not an Exception, so that a scorer's own `except Exception` does not swallow it."""


def verify(text: str, answer: str | None, verifier: str, args: dict[str, Any], prompt: str) -> float:
    """The score in [0, 1] of a response.

    Raises SpecError when the fault is the query's, RuntimeError outside the main thread."""
    _check_fields(answer, verifier, args)
    _main_thread_only()
    _load(verifier, args)
    try:
        with _time_limit():
            score = _SCORERS[verifier](text.strip(), answer, args, prompt)
            return min(max(float(score), 0.0), 1.0)
    except SpecError:
        raise
    except (Exception, _TimedOut):  # whatever a third-party scorer makes of a strange response
        _probe(answer, verifier, args, prompt)
        return 0.0


def check_spec(answer: str | None, verifier: str, args: dict[str, Any], prompt: str) -> None:
    """Raises SpecError if no response could be verified against this specification."""
    _check_fields(answer, verifier, args)
    _main_thread_only()
    _load(verifier, args)
    _probe(answer, verifier, args, prompt)


def _load(verifier: str, args: dict[str, Any]) -> None:
    """Import what the verifier needs, outside its time limit: an import that is cut off stays half done."""
    if verifier == "math_verify":
        import math_verify  # noqa: F401
    elif verifier == "reasoning_gym":
        _scorer(args["dataset"])


def _main_thread_only() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("verifiers were called in a thread; their time limit needs a main thread: use a process")


def _check_fields(answer: str | None, verifier: str, args: dict[str, Any]) -> None:
    if verifier not in ARGUMENTS:
        raise SpecError(f"unknown verifier {verifier!r}; {nearest(verifier, ARGUMENTS)}")
    known = ARGUMENTS[verifier]
    for name, value in args.items():
        if name not in known:
            raise SpecError(f"verifier_args: {verifier} takes no {name!r}; {nearest(name, known)}")
        if not isinstance(value, known[name]):
            raise SpecError(f"verifier_args: {name} = {value!r} must be of type {known[name].__name__}")
    if answer is None and verifier in ("exact", "math_verify"):
        raise SpecError(f"verifier {verifier} needs an 'answer'")
    if verifier == "regex":
        _pattern(answer, args)
    if verifier == "reasoning_gym" and "dataset" not in args:
        raise SpecError('verifier reasoning_gym needs verifier_args with a \'dataset\', e.g. {"dataset": "chain_sum"}')


def _probe(answer: str | None, verifier: str, args: dict[str, Any], prompt: str) -> None:
    """Raises SpecError if the verifier fails on the reference answer itself (for missing metadata, say)."""
    try:
        with _time_limit():
            if verifier == "math_verify":
                _gold(answer)
            if verifier == "reasoning_gym":
                _reasoning_gym(answer, answer, args, prompt)
    except SpecError:
        raise
    except (Exception, _TimedOut) as e:
        remedy = "give the entry's own answer and its whole metadata" if verifier == "reasoning_gym" else "simplify it"
        raise SpecError(
            f"verifier {verifier} fails on the reference answer {answer!r}: {type(e).__name__.strip('_')}: {e}; "
            f"{remedy}"
        ) from e


def nearest(name: str, known) -> str:
    """The nearest known name as a hint, else all of them."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"


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
        raise SpecError(f"{pattern!r} is not a regular expression: {e}") from e


def _math_verify(text: str, answer: str, args: dict, prompt: str) -> float:
    from math_verify import parse
    from math_verify import verify as same

    gold = _gold(answer)
    # Its own time limits are off: they use the same alarm as ours.
    return same(gold, parse(text, parsing_timeout=None), timeout_seconds=None)


@lru_cache(maxsize=4096)
def _gold(answer: str) -> list:
    from math_verify import parse

    for name in ("math_verify.parser", "math_verify.grader"):  # they warn that their own time limit is off
        logging.getLogger(name).setLevel(logging.ERROR)
    # Without a delimiter only the first number would be read: 3\sqrt{2} as 3.
    latex = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    gold = parse(latex, parsing_timeout=None)
    if not gold:
        raise SpecError(f"answer {answer!r} has no mathematical expression; use verifier 'exact'")
    return gold


def _reasoning_gym(text: str | None, answer: str | None, args: dict, prompt: str) -> float:
    entry = {"question": prompt, "answer": answer, "metadata": args.get("metadata", {})}
    return _scorer(args["dataset"])(text, entry)


@cache
def _scorer(dataset: str) -> Callable[[str | None, dict], float]:
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    if dataset not in DATASETS:
        raise SpecError(f"verifier_args: unknown reasoning_gym dataset {dataset!r}; {nearest(dataset, DATASETS)}")
    try:
        return get_score_answer_fn(dataset)
    except Exception as e:
        raise SpecError(f"verifier_args: reasoning_gym dataset {dataset!r} has no scorer of its own: {e}") from e


_SCORERS: dict[str, Callable[..., float]] = {
    "exact": _exact,
    "regex": _regex,
    "math_verify": _math_verify,
    "reasoning_gym": _reasoning_gym,
}


@contextmanager
def _time_limit():
    """Raise _TimedOut in the body after TIME_LIMIT seconds, and every second from then on."""

    def stop(signum, frame):
        raise _TimedOut(f"no verdict within {TIME_LIMIT:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def scorer_ids(queries: pl.DataFrame) -> pl.Series:
    """`scorer_id`: hash of what a verdict depends on besides the response: verifier, answer, verifier_args."""
    rows = queries.select("verifier", "answer", "verifier_args").iter_rows()
    return pl.Series("scorer_id", [digest("verifier", VERSION, *row) for row in rows], dtype=pl.String)
