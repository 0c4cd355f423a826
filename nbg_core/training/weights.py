"""The trained model as a folder that transformers and vLLM load: the parent's files, with other weights.

Config, generation config and tokenizer are copied byte for byte; weights are written in the parent's dtypes. The same
weights give the same bytes, so the same training gives the same checkpoint id.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

COPIED = {".json", ".jinja", ".txt", ".model", ".py"}
"""Suffixes of the parent's files that are copied: all but weights and model cards."""

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_model(policy: PreTrainedModel, weights: dict[str, Tensor], parent: Path, folder: Path, card: dict) -> None:
    """Write a model folder: `weights` (float32, by parameter name), the parent's other files, and `card` as
    training.json.

    The folder appears whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    dtypes = weight_dtypes(parent)
    default = Counter(dtypes.values()).most_common(1)[0][0]
    state = {
        name: w.to(dtypes.get(name, default)).contiguous() if w.is_floating_point() else w
        for name, w in weights.items()
    }
    policy.save_pretrained(temporary, state_dict=state)
    for file in sorted(parent.iterdir()):
        if file.suffix in COPIED and not file.name.endswith(".index.json") and file.name != "training.json":
            shutil.copyfile(file, temporary / file.name)
    for file in temporary.glob("*.safetensors"):  # only their owner can read them; a server may be another user
        file.chmod((temporary / "config.json").stat().st_mode)
    (temporary / "training.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def weight_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Dtype of every floating-point tensor in a model folder, from the headers of its files."""
    dtypes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                kind = f.get_slice(name).get_dtype()
                if kind in TORCH_DTYPES:
                    dtypes[name] = TORCH_DTYPES[kind]
    return dtypes
