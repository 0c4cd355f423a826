"""The DeepSpeed engine: policy, joint loss, AdamW, learning-rate schedule, ZeRO, offload, adapters.

Everything from token ids to the loss is one module's forward, so that ZeRO-3 gathers the output matrix for it. The loss
is divided by the counts of the whole optimizer step before the backward pass. DeepSpeed averages gradients over ranks,
so `backward` multiplies the loss by the number of ranks; and it tells DeepSpeed not to divide by accumulation steps.
Steps differ in their number of micro-batches, so DeepSpeed does not count these: `take_step` ends a step
(`managed_gradient_accumulation` is off).

bf16 keeps float32 master weights and gradients, which are also reduced over ranks in float32. DeepSpeed has no such
mode without ZeRO, so bf16 with `zero_stage` 0 runs as stage 1: the same arithmetic.

Shapes: B pairs of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from nbg_core.base.names import find
from nbg_core.config.profile import PRECISIONS
from nbg_core.config.training import TrainingSettings
from nbg_core.losses.joint import Denominators, side_sums
from nbg_core.losses.settings import LossSettings
from nbg_core.modeling.chat import padding_id
from nbg_core.modeling.forward import no_packing, output_matrix, response_hidden
from nbg_core.modeling.lm_head import lm_head_joint_loss
from nbg_core.modeling.loading import load_tokenizer
from nbg_core.modeling.packing import supports_packing
from nbg_core.modeling.sequence_parallel import check_heads, share
from nbg_core.training.data import PairBatch
from nbg_core.training.lora import add_adapters, merge_adapters
from nbg_core.training.request import TrainingRequest

DTYPES = {precision: dtype for dtype, precision in PRECISIONS.items()}


BUCKET = 50_000_000
"""Maximum number of elements of a DeepSpeed communication buffer."""


class PairModel(nn.Module):
    """The policy and the joint loss of its responses."""

    def __init__(
        self, policy: PreTrainedModel, vocab: int, settings: LossSettings, group: dist.ProcessGroup | None = None
    ):
        """`group`: ranks that get the same batches and divide their tokens among themselves."""
        super().__init__()
        self.policy, self.lm_head_loss, self.group = policy, _LmHeadLoss(output_matrix(policy), vocab, settings), group

    def forward(
        self, batch: PairBatch, denominators: Denominators, with_drift: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """This micro-batch's share of the loss, and its sums (see `joint_loss`).

        With `with_drift` also log p_policy - log p_reference [2B], float64, of whole responses, in the order chosen and
        rejected of pair 0, of pair 1, ..."""
        hidden = response_hidden(self.policy, batch.inputs, self.group)
        if self.group is not None:
            batch = batch.take(share(len(batch.token_ids), self.group))
        loss, sums, logps = self.lm_head_loss(hidden, batch, denominators, self.group)
        drift = None
        if with_drift:
            policy, reference, _ = side_sums(
                logps, batch.reference_logps, batch.pair_index, batch.is_chosen, batch.n_pairs
            )
            drift = policy - reference
            if self.group is not None:
                dist.all_reduce(drift, group=self.group)
        return loss, sums, drift


class _LmHeadLoss(nn.Module):
    """The LM head and the loss. The output matrix is a parameter of this module, so that ZeRO-3 gathers it for this
    forward pass; the backward pass does not need it."""

    def __init__(self, weight: nn.Parameter, vocab: int, settings: LossSettings):
        super().__init__()
        self.weight, self.vocab, self.settings = weight, vocab, settings

    def forward(self, hidden: Tensor, batch: PairBatch, denominators: Denominators, group: dist.ProcessGroup | None):
        return lm_head_joint_loss(
            hidden, self.weight, batch.token_ids, batch.pair_index, batch.is_chosen, batch.reference_logps,
            batch.targets, batch.n_pairs, vocab=self.vocab, settings=self.settings, denominators=denominators,
            group=group, pair_rows=batch.pair_rows,
        )  # fmt: skip


def load_policy(path: Path, settings: TrainingSettings, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model to train, in training mode, without dropout: the policy is compared with a reference without it.

    Raises ValueError for adapters on layers that cannot have them, and for a model that cannot be compiled."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    switch_off_dropout(config)
    # While this object exists, transformers partitions each weight for ZeRO-3 as it reads it.
    in_slices = HfDeepSpeedConfig(_config(settings, BUCKET)) if zero_stage(settings) == 3 else None
    dtype = getattr(torch, find(DTYPES, settings.precision, "training.precision"))
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    del in_slices
    if settings.lora is not None:
        add_adapters(model, settings.lora, settings.seed)
    if settings.compile:
        compile_layers(model, settings.gradient_checkpointing)
    elif settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def switch_off_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout rate to 0, in place, also those of the language model in a composite configuration."""
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                setattr(part, name, 0.0)


def compile_layers(model: PreTrainedModel, gradient_checkpointing: bool) -> None:
    """Compile each layer separately, in place. Equal layers share one program for all lengths, made at first use.

    Gradient checkpointing wraps the compiled layer. transformers' own would be inside the layer and keep all of it from
    being compiled. Raises ValueError for a model that does not name its layers, and where nothing can be compiled."""
    try:
        torch.compile(torch.exp)(torch.zeros(2, device="cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:
        raise ValueError(
            "training.compile: nothing can be compiled here; install a C and C++ compiler (gcc, g++) and Python's "
            f"headers, or switch it off ({str(error).strip().splitlines()[0]})"
        ) from error
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"training.compile: model type {model.config.model_type!r} names no layers; switch it off")
    for layer in layers:
        forward = torch.compile(layer.forward, dynamic=True)
        if gradient_checkpointing:  # without dropout there is no random state to keep
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = forward


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 0.0,
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
}
"""Schedules by name: share of the steps after warm-up that are done -> where the learning rate is between its peak (0)
and its minimum (1)."""


def learning_rate(settings: TrainingSettings, n_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the 0-based step: linear warm-up, then the schedule down to its minimum.

    It depends on the step alone, so saved states do not hold it. Raises ValueError for an unknown schedule."""
    decay = find(SCHEDULES, settings.schedule, "training.schedule")
    warmup = math.ceil(settings.warmup_fraction * n_steps)

    def rate(step: int) -> float:
        if step < warmup:
            return settings.learning_rate * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, n_steps - 1 - warmup)
        return settings.learning_rate * (1 - (1 - settings.min_lr_fraction) * decay(done))

    return rate


def zero_stage(settings: TrainingSettings) -> int:
    """The ZeRO stage that DeepSpeed runs: bf16 needs at least 1."""
    return max(settings.zero_stage, 1) if settings.precision == "bf16" else settings.zero_stage


def build_engine(request: TrainingRequest) -> tuple[deepspeed.DeepSpeedEngine, int | None]:
    """The engine, and the token id that batches are padded with, or None for a policy that is packed.

    Every rank of the process group calls it, after `init_distributed`. Raises ValueError for a policy whose logits are
    not simply hidden states times the output matrix."""
    s = request.training
    tokenizer = load_tokenizer(request.policy_path, trust_remote_code=request.trust_remote_code)
    policy = load_policy(request.policy_path, s, trust_remote_code=request.trust_remote_code)
    loss = LossSettings(**s.loss.model_dump(), temperature=request.temperature)
    model = PairModel(policy, len(tokenizer), loss, _sequence_group(s, policy.config))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        optimizer=lambda p: AdamW(p, lr=s.learning_rate, betas=s.adam_betas, weight_decay=s.weight_decay, fused=True),
        config=_config(s, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())),
    )
    return engine, None if supports_packing(policy.config) else padding_id(tokenizer)


def _sequence_group(s: TrainingSettings, config: PreTrainedConfig) -> dist.ProcessGroup | None:
    """The ranks that share the tokens of this one's batches; None without sequence parallelism. They are neighbours, so
    on one machine. Raises ValueError for a model whose tokens or heads cannot be divided among them."""
    if s.sequence_parallel == 1:
        return None
    if not supports_packing(config):
        raise ValueError(f"training.sequence_parallel needs a packed model: {no_packing(config)}")
    text = config.get_text_config()
    check_heads(text.num_attention_heads, text.num_key_value_heads, s.sequence_parallel)
    return dist.new_subgroups(s.sequence_parallel)[0]


def _config(s: TrainingSettings, n_parameters: int) -> dict:
    """DeepSpeed's configuration. Its buckets are allocated whole, so they are no larger than the model."""
    bucket = min(n_parameters, BUCKET)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires it, and only counts with it
        "managed_gradient_accumulation": False,
        "gradient_clipping": s.max_grad_norm if zero_stage(s) else 0.0,  # stage 0: `take_step` clips
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam takes minutes to compile at the first start
        "zero_optimization": {
            "stage": zero_stage(s), "reduce_bucket_size": bucket,
            "overlap_comm": False,  # it could only be faster, on GPUs, and has not been tried there
            "allgather_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket,
        },
        "steps_per_print": 1 << 62,
    }  # fmt: skip
    if s.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if s.precision == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        config["communication_data_type"] = "fp32"
    return config


def backward(engine: deepspeed.DeepSpeedEngine, loss: Tensor) -> None:
    """Add the gradient of a share of the step's loss. DeepSpeed averages over ranks, but the loss is their sum."""
    engine.backward(loss * engine.world_size, scale_wrt_gas=False)


def take_step(engine: deepspeed.DeepSpeedEngine, settings: TrainingSettings, rate: float) -> float:
    """Reduce the gradients of all `backward` calls over ranks, clip them, and update the weights with the learning rate
    `rate`.

    Returns the gradient norm before clipping, NaN if it is not finite; the weights must not be used then."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = rate
    if zero_stage(settings) == 0:
        norm = _step_and_clip(engine, settings.max_grad_norm)
    else:
        engine.step()
        norm = float(engine.get_global_grad_norm())
    return norm if math.isfinite(norm) and norm >= 0 and engine.was_step_applied() else math.nan


def _step_and_clip(engine: deepspeed.DeepSpeedEngine, max_norm: float) -> float:
    """A step without ZeRO. DeepSpeed could clip too, but does not report the norm; this clips after its reduction."""
    norms = []

    def clip(*_) -> None:
        norms.append(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_norm))

    hook = engine.basic_optimizer.register_step_pre_hook(clip)
    engine.step()
    hook.remove()
    return float(norms[0])


def full_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """The policy's parameters and buffers by name, whole, float32 where there is a master copy, on the CPU of rank 0;
    adapters merged.

    All ranks call it; the others get empty tensors, so that only one copy of a large model is made."""
    policy, here = engine.module.policy, dist.get_rank() == 0
    weights = {}
    for name, parameter in policy.named_parameters():  # a tied parameter comes once
        full = safe_get_full_fp32_param(parameter)
        if full is None:  # no ZeRO, or a frozen parameter, which ZeRO-3 partitions all the same
            with deepspeed.zero.GatheredParameters([parameter]):
                full = parameter.detach().clone() if here else None
        weights[name] = full.detach().cpu() if here else torch.empty(0)
    parameters = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
    buffers = {n: b for n, b in policy.state_dict(keep_vars=True).items() if n not in parameters}
    weights |= {name: buffer.detach().cpu() for name, buffer in buffers.items()}
    return merge_adapters(policy, weights) if here else weights
