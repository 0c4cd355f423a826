"""Settings of training: section `training` of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nbg_core.base.section import Section
from nbg_core.losses.settings import LossConfig


class LoraSettings(Section):
    """Low-rank adapters: weights W + alpha / rank * B A, with B = 0 at the start (Hu et al. 2021, arXiv 2106.09685).
    There is no dropout, because the policy is compared with a reference that has none."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of A and B."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale of the update; it is divided by `rank`."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear` is every linear layer except the LM head."""


class TrainingSettings(Section):
    loss: LossConfig = LossConfig()
    """The joint loss."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the pairs."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimizer steps; null trains all epochs."""
    global_batch_pairs: Annotated[int, Field(ge=1)] = 64
    """Pairs per optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 16384
    """Maximum number of tokens per forward pass on one rank; a longer pair gets a pass of its own."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate. The default suits the embedded models; real ones need 1e-6 or so."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps in which the learning rate rises linearly to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after warm-up."""
    min_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the last step, as a share of the peak, with schedule cosine or linear."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay, of all trained weights (HF's Trainer would leave out biases and norms)."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW betas."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Maximum global gradient norm; larger gradients are scaled down to it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the weights in training, which must match models.dtype; bf16 keeps fp32 master weights."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; with bf16, 0 runs as 1."""
    offload_optimizer: bool = False
    """Keep fp32 master weights and Adam's moments in CPU memory and update them there; needs zero_stage 1 or more."""
    n_processes: Annotated[int, Field(ge=1)] = 1
    """Ranks on this machine; with a hostfile, ranks per node."""
    hostfile: Path | None = None
    """DeepSpeed hostfile; null trains on this machine alone."""
    sequence_parallel: Annotated[int, Field(ge=1)] = 1
    """Ranks of a machine that share the tokens of a micro-batch, for pairs too long for one rank; must divide
    n_processes and the model's attention heads."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile the model's layers with `torch.compile`: faster on a GPU after a slower start, with different rounding.
    Not with zero_stage 3; needs a C and a C++ compiler. Switching it does not make a finished training stale."""
    lora: LoraSettings | None = None
    """Train low-rank adapters only, which are merged into the weights at the end; null trains all weights."""
    save_every: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps between resumable states; a crash loses at most this many."""
    seed: int = 0
    """Seed of the data order and of the adapters' initial weights."""

    @model_validator(mode="after")
    def _offload_has_a_stage(self):
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer needs zero_stage 1, 2 or 3; set zero_stage, or offload_optimizer to false"
            )
        return self

    @model_validator(mode="after")
    def _compiled_layers_are_whole(self):
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile needs zero_stage 0, 1 or 2, since stage 3 splits each layer's weights over the ranks; set "
                "compile to false, or a lower zero_stage"
            )
        return self

    @model_validator(mode="after")
    def _sequences_are_shared_by_whole_groups(self):
        if self.n_processes % self.sequence_parallel:
            raise ValueError(
                f"n_processes={self.n_processes} is not a multiple of sequence_parallel={self.sequence_parallel}: "
                "ranks share sequences in groups of that size; change one of the two"
            )
        return self

    def identity_fields(self) -> dict:
        """The settings that decide the trained weights, up to rounding.

        Ranks, ZeRO stage, offload, micro-batches and recomputation are left out, because they only change how the same
        sums are computed. So a training that was interrupted on 8 ranks can be resumed on 4."""
        return self.model_dump(mode="json", exclude=_HOW_A_TRAINING_RUNS)


# Settings that change how a training runs, and not which weights it gives.
_HOW_A_TRAINING_RUNS = {"micro_batch_tokens", "zero_stage", "offload_optimizer", "n_processes", "hostfile",
                        "sequence_parallel", "gradient_checkpointing", "compile", "save_every"}  # fmt: skip
