"""Entry point of the `nbg` command."""

from __future__ import annotations

import sys

from rich.text import Text

from nbg_assets.cli import maintenance, runs, show, sql  # noqa: F401  (each adds its commands to the app)
from nbg_assets.cli.app import app, errors
from nbg_core.base.errors import is_defect, user_message


def main() -> None:
    """Run the command. An error that a user can correct is one line on stderr and exit code 1, without a traceback."""
    try:
        app()
    except Exception as e:
        if is_defect(e):
            raise
        errors.print(Text.assemble(("error: ", "red"), user_message(e)), soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
