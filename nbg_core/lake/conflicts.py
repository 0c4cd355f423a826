"""Writers that meet: whose transaction failed because of another's tries it again, whole."""

from __future__ import annotations

import re

import duckdb
from tenacity import retry, retry_if_exception, stop_after_delay, wait_random_exponential

RETRY_SECONDS = 120

_CONTENTION = re.compile(r"\b(lock|locked|deadlock|busy|conflict|conflicts|conflicting|serialize)\b", re.IGNORECASE)


def is_conflict(error: BaseException) -> bool:
    """Whether another writer was in the way and the transaction can simply be tried again."""
    mistakes = (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException)  # may name any word
    return isinstance(error, duckdb.Error) and not isinstance(error, mistakes) and bool(_CONTENTION.search(str(error)))


def retry_on_conflict(attempt, *args):
    """`attempt(*args)`, again and again while other writers are in the way, for RETRY_SECONDS at most."""
    return retry(
        retry=retry_if_exception(is_conflict),
        wait=wait_random_exponential(multiplier=0.05, max=5),
        stop=stop_after_delay(RETRY_SECONDS),
        reraise=True,
    )(attempt)(*args)


def quietly_rollback(con) -> None:
    try:
        con.execute("ROLLBACK")
    except duckdb.Error:  # a failed COMMIT has already ended the transaction
        pass
