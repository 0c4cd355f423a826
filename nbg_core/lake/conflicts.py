"""Retries a transaction that conflicted with another writer's."""

from __future__ import annotations

import re

import duckdb
from tenacity import retry, retry_if_exception, stop_after_delay, wait_random_exponential

RETRY_SECONDS = 120

_CONTENTION = re.compile(r"\b(lock|locked|deadlock|busy|conflict|conflicts|conflicting|serialize)\b", re.IGNORECASE)


def is_conflict(error: BaseException) -> bool:
    """Whether an error is a conflict with another writer, so that the transaction can be retried."""
    # Messages of mistakes in a statement quote its names, which may contain such a word.
    mistakes = (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException)
    return isinstance(error, duckdb.Error) and not isinstance(error, mistakes) and bool(_CONTENTION.search(str(error)))


def retry_on_conflict(attempt, *args):
    """Call `attempt(*args)`, and again while it conflicts with other writers, for at most RETRY_SECONDS."""
    return retry(
        retry=retry_if_exception(is_conflict),
        wait=wait_random_exponential(multiplier=0.05, max=5),
        stop=stop_after_delay(RETRY_SECONDS),
        reraise=True,
    )(attempt)(*args)


def rollback_quietly(con) -> None:
    """Roll back, if there is still a transaction to roll back."""
    try:
        con.execute("ROLLBACK")
    except duckdb.Error:  # a failed COMMIT has already ended the transaction
        pass
