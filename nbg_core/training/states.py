"""Resumable training states, independent of the number of ranks that wrote them.

A state is a folder `step-00000020/` of safetensors files. They hold each trainable parameter whole and by name: its
float32 weight and Adam's two moments. The manifest `step-00000020.json`, written last, holds the step and the sizes and
hashes of the files. The learning rate and the batches follow from the step. So training continues with any number of
ranks, ZeRO stage and offload, and with the same ones bit for bit.

A state counts only if its manifest is there and all files match it. After a crash while saving, or a disk error,
training continues from the state before. The two newest are kept.

Parameters are gathered one at a time. Besides its part of the training, a rank holds one whole parameter and the
tensors of the file that it is filling (FILE_BYTES).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nbg_core.base.files import write_json

KEPT = 2
"""Number of states that are kept."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, by their names in torch."""
FILE_BYTES = 1 << 30
"""A file is written as soon as its tensors have this many bytes."""


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, step: int) -> None:
    """Save the state after `step` optimizer steps; collective. Older states than the two newest are removed."""
    tag = f"step-{step:08d}"
    if dist.get_rank() == 0:
        _remove(folder, tag)
        (folder / tag).mkdir(parents=True)
    dist.barrier()
    _write(engine, folder / tag)
    dist.barrier()
    files = _hashes(folder / tag)
    if dist.get_rank() == 0:
        write_json(folder / f"{tag}.json", {"step": step, "files": files})
        for old in _tags(folder)[KEPT:]:
            _remove(folder, old)


def resume(engine: deepspeed.DeepSpeedEngine, folder: Path) -> int:
    """Load the newest intact state and return the number of optimizer steps it was saved after; 0 if there is none.
    Collective."""
    for tag in _tags(folder):
        manifest = json.loads((folder / f"{tag}.json").read_text())
        if manifest["files"] == _hashes(folder / tag):
            _read(engine, folder / tag, manifest["step"])
            return manifest["step"]
        if dist.get_rank() == 0:
            print(
                f"student_checkpoint: the training state {folder / tag} is damaged; trying the one before", flush=True
            )
    return 0


def _parameters(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in engine.module.policy.named_parameters() if p.requires_grad)


def _write(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """All ranks gather each parameter, and take turns in keeping one, so that all of them write files."""
    rank, world = dist.get_rank(), dist.get_world_size()
    kept: dict[str, Tensor] = {}
    n_files = 0

    def flush() -> None:
        nonlocal n_files
        if kept:
            save_file(kept, folder / f"{rank:04d}-{n_files:04d}.safetensors")
            kept.clear()
            n_files += 1

    for i, (name, p) in enumerate(_parameters(engine)):
        whole = {"weight": _whole(engine, p)} | {moment: _whole(engine, p, moment) for moment in MOMENTS}
        if i % world == rank:
            kept |= {f"{name}/{key}": tensor.cpu().contiguous() for key, tensor in whole.items()}
            if sum(t.nbytes for t in kept.values()) >= FILE_BYTES:
                flush()
    flush()


def _whole(engine: deepspeed.DeepSpeedEngine, p: nn.Parameter, moment: str | None = None) -> Tensor:
    """The float32 weight of a parameter, or a moment, whole; collective."""
    if engine.zero_optimization_stage() == 0:
        return p.detach() if moment is None else engine.basic_optimizer.state[p][moment]
    return safe_get_full_fp32_param(p) if moment is None else safe_get_full_optimizer_state(p, moment)


def _read(engine: deepspeed.DeepSpeedEngine, folder: Path, step: int) -> None:
    _make_moments(engine, step)
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    for name, p in _parameters(engine):
        whole = {}
        for key in ("weight", *MOMENTS):
            with safe_open(where[f"{name}/{key}"], "pt") as file:  # mapped, not read, so opening it again costs nothing
                whole[key] = file.get_tensor(f"{name}/{key}")
        _put(engine, p, whole)


def _make_moments(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """Create Adam's state as after `step` updates, with moments of 0: AdamW itself only does at its first update."""
    optimizer = engine.basic_optimizer
    if engine.zero_optimization_stage() == 3:
        trained = engine.optimizer.fp32_partitioned_groups_flat
    else:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
    for p in trained:
        state = {"step": torch.tensor(float(step), device=p.device)} | {
            moment: torch.zeros_like(p) for moment in MOMENTS
        }
        optimizer.state[p] = {key: tensor.detach() for key, tensor in state.items()}
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # makes the setters see what is in `optimizer.state`


def _put(engine: deepspeed.DeepSpeedEngine, p: nn.Parameter, whole: dict[str, Tensor]) -> None:
    """Set weight, float32 master weight and moments of a parameter; collective under ZeRO-3."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        # Each rank owns a slice, the last one padded; `safe_set_full_fp32_param` would read past the end there.
        n = p.ds_tensor.numel()  # type: ignore[attr-defined]  # ZeRO-3 gives it to every parameter
        start = n * dist.get_rank()
        own = {key: t.flatten()[start : start + n] for key, t in whole.items()}
        own = {key: nn.functional.pad(t, (0, n - t.numel())) for key, t in own.items()}
        safe_set_local_fp32_param(p, own["weight"])
        for moment in MOMENTS:
            safe_set_local_optimizer_state(p, own[moment], moment)
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.data.copy_(whole["weight"])
        return
    with torch.no_grad():
        p.copy_(whole["weight"])
    for moment in MOMENTS:
        if stage == 0:
            engine.basic_optimizer.state[p][moment].copy_(whole[moment])
        else:
            safe_set_full_optimizer_state(p, whole[moment], moment)
    if stage:
        safe_set_full_fp32_param(p, whole["weight"])


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
