"""Commands that change the lake: `promote`, `compact`."""

from __future__ import annotations

from typing import Annotated

import typer

from nbg_assets.cli.app import app, console, open_lake
from nbg_core.evaluation import promotion
from nbg_core.evaluation.promotion import promotion_blocker
from nbg_core.lineage.policy import SFT, current_policy


@app.command("compact")
def compact_files() -> None:
    """Merge the lake's small files into larger ones, and delete files that killed writers left behind.

    No snapshot changes its content."""
    from nbg_core.lake.compact import KEEP, compact
    from nbg_core.lake.orphaned_files import delete_orphaned_files

    _, lake = open_lake()
    for name, before, after in compact(lake).iter_rows():
        console.print(f"{name}: {before} files are now {after}")
    console.print(f"replaced files are deleted by the next `nbg compact` after {KEEP}")
    try:
        if deleted := delete_orphaned_files(lake):
            console.print(
                f"{len(deleted)} files deleted that writers left behind when they were killed before their commit"
            )
    except ValueError as e:  # what was merged stays merged
        console.print(f"note: {e}", soft_wrap=True)


@app.command()
def promote(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint id, or its beginning; sft is the profile's student.")],
    reason: Annotated[str, typer.Option(help="Recorded with the promotion.")] = "promoted by hand",
    force: Annotated[bool, typer.Option(help="Promote it even if its evaluation says no.")] = False,
) -> None:
    """Make a checkpoint the policy that the next round samples from."""
    profile, lake = open_lake()
    if not force and checkpoint != SFT and (why := promotion_blocker(lake, checkpoint, profile.evaluation.min_queries)):
        raise ValueError(f"{checkpoint} is not promoted: {why}; see `nbg report {checkpoint}`, or use --force")
    promotion.promote(lake, profile, checkpoint, reason)
    console.print(f"policy is now {current_policy(lake, profile).model_id}; `nbg status` shows what to refresh")
