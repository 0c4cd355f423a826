"""Resumable training states: DeepSpeed's own checkpoints, each made valid by a manifest that is written last.

A state is a folder `step-00000020/` (written by all ranks) and `step-00000020.json` (sizes and hashes of its files).
Without a manifest, or when a file does not match it, a state does not count: a crash while saving, or a damaged
disk, falls back to the one before. The two newest are kept. They are working files of this machine, with pickles in
them; never point `paths.work` at a folder that others can write to.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import deepspeed
import torch.distributed as dist

from nbg_core.files import write_json

KEPT = 2


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, step: int) -> None:
    """Save the state after `step` optimizer steps; collective. Older states than the two newest are removed."""
    tag = f"step-{step:08d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder, tag)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    files = _hashes(folder / tag)
    if dist.get_rank() == 0:
        write_json(folder / f"{tag}.json", {"step": step, "world_size": dist.get_world_size(), "files": files})
        for old in _tags(folder)[KEPT:]:
            _remove(folder, old)


def resume(engine: deepspeed.DeepSpeedEngine, folder: Path) -> int:
    """Load the newest whole state, if there is one, and return the optimizer steps it has behind it; collective."""
    for tag in _tags(folder):
        manifest = json.loads((folder / f"{tag}.json").read_text())
        files = _hashes(folder / tag)
        problem = None
        if manifest["world_size"] != dist.get_world_size():
            problem = f"is of {manifest['world_size']} ranks, not of {dist.get_world_size()}"
        elif manifest["files"] != files:
            problem = "is damaged"
        if problem is None:
            engine.load_checkpoint(str(folder), tag=tag)
            return manifest["step"]
        if dist.get_rank() == 0:
            print(f"student_checkpoint: the training state {folder / tag} {problem}; trying the one before", flush=True)
    return 0


def _tags(folder: Path) -> list[str]:
    """Tags with a manifest, newest first."""
    return sorted((p.stem for p in folder.glob("step-*.json")), reverse=True)


def _hashes(folder: Path) -> dict[str, list]:
    """Size and hash of every file below `folder`; collective, each rank hashes its share."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    share = {}
    for path in paths[dist.get_rank() :: dist.get_world_size()]:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        share[str(path.relative_to(folder))] = [path.stat().st_size, digest]
    shares: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    return {name: value for part in shares for name, value in part.items()}


def _remove(folder: Path, tag: str) -> None:
    (folder / f"{tag}.json").unlink(missing_ok=True)  # the manifest first: what is half removed does not count
    shutil.rmtree(folder / tag, ignore_errors=True)
