"""Error messages for users: without secrets, and with a remedy where the message itself has none."""

from __future__ import annotations

import os
import re


def redact(text: str) -> str:
    """`text` with *** in place of passwords in connection strings, and of values of secret-looking environment
    variables."""
    text = without_passwords(text)
    for value in _secret_values():
        text = text.replace(value, "***")
    return text


def without_passwords(text: str) -> str:
    """`text` with *** in place of passwords in connection strings."""
    text = re.sub(r"(?i)(password\s*=\s*)('[^']*'|[^\s;'\"]+)", r"\1***", text)
    return re.sub(r"(\w+://[^\s:/@]+:)[^\s@/]+@", r"\1***@", text)


def user_message(error: BaseException) -> str:
    """The message to show for an error: without secrets, and with a remedy for a PermissionError."""
    text = redact(str(error)) or type(error).__name__
    if isinstance(error, PermissionError):
        text += "; give this user access to it, or set `paths` and `lake` in the profile (or NBG_ROOT) elsewhere"
    return text


def is_defect(error: BaseException) -> bool:
    """Whether an error is likely a bug, so that its traceback is shown.

    This project raises ValueError, LookupError, OSError and RuntimeError with a message that names value, place and
    remedy, so they are shown without a traceback. KeyError and IndexError are LookupErrors, but bugs. A bug inside a
    library that raises a RuntimeError, as torch does, is not recognised."""
    return isinstance(error, (KeyError, IndexError)) or not isinstance(
        error, (ValueError, LookupError, OSError, RuntimeError)
    )


def _secret_values() -> list[str]:
    names = re.compile(r"(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY)$", re.IGNORECASE)
    return [v for k, v in os.environ.items() if names.search(k) and len(v) >= 8]
