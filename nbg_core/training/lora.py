"""Low-rank adapters: put into the policy before training, merged into its weights after it.

The layers are peft's, injected in place, so the policy stays the model class that it is. Adapters start at 0 (B is 0):
before the first update the policy is its reference, bit for bit.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from nbg_core.base.ids import seed_from
from nbg_core.config.training import LoraSettings

ADAPTER = "default"


def add_adapters(policy: PreTrainedModel, settings: LoraSettings, seed: int) -> None:
    """Give the policy's target layers adapters, the same on every rank; all other weights are frozen.

    Raises ValueError when no layer is a target, or an embedding or the LM head is."""
    config = LoraConfig(
        r=settings.rank, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides it by r: it need not be whole
        target_modules=settings.target_modules if isinstance(settings.target_modules, str)
        else list(settings.target_modules),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed_from("lora", seed))
        inject_adapter_in_model(config, policy)
    for name, module in policy.named_modules():
        # The loss reads the output matrix directly and would miss an adapter; merging one would untie tied weights.
        if isinstance(module, LoraLayer) and module in (policy.get_input_embeddings(), policy.get_output_embeddings()):
            raise ValueError(
                f"training.lora.target_modules {settings.target_modules} contains {name}, an embedding or the LM "
                "head, which cannot have an adapter; leave it out"
            )


def merge_adapters(policy: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` of a policy with adapters, by name, as those of a policy without: W + alpha / rank * B A, float32."""
    merged = dict(weights)
    for name, layer in policy.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        a, b = (merged.pop(f"{name}.lora_{side}.{ADAPTER}.weight").float() for side in "AB")
        change = layer.scaling[ADAPTER] * (b @ a)
        weight = merged.pop(f"{name}.base_layer.weight").float()
        is_transposed = layer.fan_in_fan_out  # type: ignore[attr-defined]  # every kind of layer sets it
        merged[f"{name}.weight"] = weight + (change.T if is_transposed else change)
        if (bias := merged.pop(f"{name}.base_layer.bias", None)) is not None:
            merged[f"{name}.bias"] = bias
    return merged
