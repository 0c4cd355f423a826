"""What all commands share: the typer app, the consoles, and opening the profile and its lake."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from nbg_core.config.load import load_profile
from nbg_core.config.profile import Profile
from nbg_core.lake.lake import Lake

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The `nbg` command: run what is stale, see what is there, query the lake.",
)
# No markup and no emoji codes: brackets and colons in names, errors and answers are printed as they are.
console, errors = (
    Console(highlight=False, markup=False, emoji=False, stderr=e, width=None if sys.stdout.isatty() else 160)
    for e in (False, True)
)
Slices = Annotated[
    list[str] | None, typer.Option("--slice", "-s", help="Refresh or show only this slice (repeatable).")
]


def open_lake() -> tuple[Profile, Lake]:
    """The profile chosen by NBG_PROFILE, and its lake."""
    profile = load_profile()
    return profile, Lake.of(profile)


def say(line: str) -> None:
    """Print a line without wrapping it."""
    console.print(line, soft_wrap=True)


def short(value: object, width: int = 60) -> str:
    """`value` as a table cell of at most `width` characters."""
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value).replace("\n", "\\n")
    return text if len(text) <= width else text[: width - 1] + "…"
