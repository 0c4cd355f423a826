"""The one forward pass that scores responses: teacher, reference and trainer all take hidden states from here.

Neighbouring responses with the same prompt share it (`packing`). For architectures whose packed attention is not
tested, sequences are padded on the right instead (`padded`): one for each response, with its own copy of the prompt.

Shapes: T response tokens of all responses, concatenated; H hidden; V rows of the output matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig, PreTrainedModel

from nbg_core.modeling.packing import MODEL_TYPES, Pack, pack, packed_hidden
from nbg_core.modeling.padded import Padded, pad, padded_hidden

_LOGIT_SETTINGS = (  # names of a scale or cap of the logits in transformers' configurations
    "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale", "logits_scaling",
    "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier",
)  # fmt: skip


def collate(prompts: Sequence, responses: Sequence, pad_id: int | None = None) -> Pack | Padded:
    """The inputs of one forward pass. prompts[i] precedes responses[i]; both are lists or integer arrays of token ids.

    They are packed, or padded with `pad_id` if one is given. The T rows are in order of response, then position."""
    if pad_id is not None:
        return pad(prompts, responses, pad_id)
    trees: list[tuple[Sequence, list]] = []
    for prompt, response in zip(prompts, responses, strict=True):
        if trees and np.array_equal(trees[-1][0], prompt):
            trees[-1][1].append(response)
        else:
            trees.append((prompt, [response]))
    return pack([p for p, _ in trees], [branches for _, branches in trees])


def response_hidden(model: PreTrainedModel, inputs: Pack | Padded, group: ProcessGroup | None = None) -> Tensor:
    """Hidden states [T, H] in the model's dtype; row t predicts response token t.

    With a group, only those of this rank's share of the T rows. Raises ValueError for a group and a padded batch."""
    if isinstance(inputs, Pack):
        return packed_hidden(model, inputs, group)
    if group is not None:
        raise ValueError("a padded batch cannot be shared by a group; set training.sequence_parallel to 1")
    return padded_hidden(model, inputs)


def no_packing(config: PreTrainedConfig) -> str:
    """The message for a user whose model is not packed."""
    return (
        f"model type {config.model_type!r}: prompts are not shared and batches are padded, which is slower; packing is "
        f"tested for {', '.join(MODEL_TYPES)}"
    )


def has_plain_lm_head(model: PreTrainedModel) -> bool:
    """Whether logits are hidden states times the output matrix and nothing else: no bias, scale or soft cap."""
    lm_head, configs = model.get_output_embeddings(), (model.config, model.config.get_text_config())
    changed = any(getattr(config, name, None) not in (None, 1) for config in configs for name in _LOGIT_SETTINGS)
    return type(lm_head) is nn.Linear and lm_head.bias is None and not changed


def output_matrix(model: PreTrainedModel) -> nn.Parameter:
    """The output matrix [V, H]. Raises ValueError for a model whose logits are not simply hidden states times it."""
    if not has_plain_lm_head(model):
        raise ValueError(
            f"model type {model.config.model_type!r} has an LM head with a bias, or scales or caps its logits; use a "
            "model whose logits are its hidden states times the LM head's weight"
        )
    return model.get_output_embeddings().weight
