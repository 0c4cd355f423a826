"""What a user is told of an error."""

from __future__ import annotations

import os
import re


def redact(text: str) -> str:
    """`text` without passwords of connection strings and values of secret-looking environment variables."""
    text = re.sub(r"(?i)(password\s*=\s*)('[^']*'|[^\s;'\"]+)", r"\1***", text)
    text = re.sub(r"(\w+://[^\s:/@]+:)[^\s@/]+@", r"\1***@", text)
    for value in _secret_values():
        text = text.replace(value, "***")
    return text


def sentence(error: BaseException) -> str:
    """What a user is told of an error: secrets blanked, and the remedy where a folder cannot be written."""
    text = redact(str(error)) or type(error).__name__
    if isinstance(error, PermissionError):
        text += "; give this user access to it, or set `paths` and `lake` in the profile (or NBG_ROOT) elsewhere"
    return text


def is_defect(error: BaseException) -> bool:
    """Whether the traceback is what helps; errors of the other kinds are made to name value, place and remedy."""
    return isinstance(error, (KeyError, IndexError)) or not isinstance(
        error, (ValueError, LookupError, OSError, RuntimeError)
    )


def _secret_values() -> list[str]:
    names = re.compile(r"(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY)$", re.IGNORECASE)
    return [v for k, v in os.environ.items() if names.search(k) and len(v) >= 8]
