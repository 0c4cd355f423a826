"""The training steps that `train_step.py` compares: a function for each variant, from the same pairs to the loss.

    A         the usual implementation: padded batches, float32 log-softmax at every position of the student and of live
              reference and teacher models, KL over the whole vocabulary
    A0        A with the stored reference log-probs and teacher entries that B to D use; their log-probs are gathered
              from one log-softmax at every position (DistillKit's sparse KL beside a plain DPO would compute two)
    A0 rows   A0 with the log-softmax at response positions only
    B         padded batches, and the loss computed from hidden states (`lm_head_joint_loss`)
    C         B without padding: every response packed with a prompt of its own
    D         C with one prompt for both responses of a pair; this is what the project trains with
    D lean    D with gradient checkpointing (`training.gradient_checkpointing`)
    TRL       TRL's kernels: its fused log-probs with a stored reference, and its divergence to a live teacher
    Liger     Liger's kernels: its DPO with a live reference, and its JSD at beta 0, which is the forward KL, to a live
              teacher
    TRL DPO   TRL's DPOTrainer with precomputed reference log-probs; DPO alone, so it does less than all others

Where TRL or Liger leave a choice, the faster way is taken. TRL's kernels and Liger's JSD get response rows only, as in
TRL on a GPU; on a CPU its trainers project every position. DPOTrainer is used unchanged, without gradient
checkpointing. Liger's DPO takes only whole padded sequences. In `train_step.py` the live teacher is as large as the
student.

Shapes: B pairs, N = 2 B sequences (chosen and rejected of pair 0, of pair 1, ...), L padded length, T response tokens
of all sequences, concatenated, H hidden, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from nbg_core.config.profile import TeacherSettings
from nbg_core.losses.joint import Denominators, joint_loss, pair_loss
from nbg_core.losses.settings import LossSettings
from nbg_core.losses.targets import TeacherTargets
from nbg_core.losses.token_divergence import token_divergence
from nbg_core.modeling.forward import output_matrix
from nbg_core.modeling.lm_head import lm_head_joint_loss, lm_head_logps, logit_tiles
from nbg_core.modeling.packing import Pack, pack, packed_hidden
from nbg_core.modeling.padded import Padded, pad, padded_hidden
from nbg_core.teacher.store import compress, targets

SETTINGS = LossSettings()
STORED = TeacherSettings(k_head=32, m_tail=32, epsilon=0.0, min_weight=0.0)
IGNORED = -100


@dataclass(frozen=True)
class Pairs:
    """A micro-batch in every layout, with its stored reference log-probs and teacher entries."""

    padded: Padded
    labels: Tensor
    """[N, L] int64, not shifted: token ids of responses, IGNORED elsewhere."""
    packed: Pack
    shared: Pack
    token_ids: Tensor
    """[T] int64."""
    pair_index: Tensor
    """[T] int64."""
    is_chosen: Tensor
    """[T] bool."""
    reference_logps: Tensor
    """[T] float32."""
    targets: TeacherTargets
    examples: list[dict]
    """The input of TRL's collator: prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps, ref_rejected_logps."""
    unique_tokens: int
    """Tokens of prompts, counted once per pair, and of responses."""

    @property
    def n(self) -> int:
        return len(self.examples)

    @property
    def denominators(self) -> Denominators:
        n_chosen = int(self.is_chosen.sum())
        return Denominators(self.n, n_chosen, len(self.is_chosen) - n_chosen)


@dataclass(frozen=True)
class Models:
    student: PreTrainedModel
    reference: PreTrainedModel
    teacher: PreTrainedModel


Terms = dict[str, Tensor]
"""`loss`, from which the backward pass starts, and, if a variant computes them separately, its terms: dpo, kl_chosen,
kl_rejected."""
Step = Callable[[], Terms]


def make_models(shape: dict) -> Models:
    """Three Qwen3 models of one shape with random weights; `shape` is keyword arguments of Qwen3Config."""

    def model(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = Qwen3Config(head_dim=64, max_position_embeddings=1 << 15, attn_implementation="sdpa", **shape)
        return Qwen3ForCausalLM(config)

    return Models(model(0), *(model(seed).eval().requires_grad_(False) for seed in (1, 2)))


def make_pairs(models: Models, prompts: list[list[int]], responses: list[list[list[int]]]) -> Pairs:
    """Pairs of `prompts` and the two responses to each, scored with reference and teacher."""
    n, device = len(prompts), models.student.device
    flat = [r for both in responses for r in both]
    repeated = [p for p in prompts for _ in range(2)]
    lengths = [len(r) for r in flat]
    padded = pad(repeated, flat, 0).to(device)
    token_ids = torch.from_numpy(np.concatenate(flat)).to(device)
    labels = torch.full_like(padded.ids, IGNORED)
    labels.view(-1)[padded.rows + 1] = token_ids  # row t predicts the next position
    vocab = models.student.config.vocab_size
    with torch.no_grad():
        hidden, weight = padded_hidden(models.reference, padded), output_matrix(models.reference)
        reference_logps = lm_head_logps(hidden, weight, token_ids, vocab=vocab)
        tiles = logit_tiles(padded_hidden(models.teacher, padded), output_matrix(models.teacher), vocab=vocab)
        rows = compress(tiles, token_ids, lengths, [str(i) for i in range(2 * n)], STORED)
    sums = [float(part.double().sum()) for part in reference_logps.split(lengths)]
    examples = [
        {"prompt_ids": list(p), "chosen_ids": list(c), "rejected_ids": list(r), "ref_chosen_logps": sums[2 * i],
         "ref_rejected_logps": sums[2 * i + 1]}
        for i, (p, (c, r)) in enumerate(zip(prompts, responses, strict=True))
    ]  # fmt: skip
    side = torch.arange(2 * n).repeat_interleave(torch.tensor(lengths)).to(device)  # [T]
    stored = TeacherTargets(**{name: tensor.to(device) for name, tensor in vars(targets(rows)).items()})
    return Pairs(
        padded, labels, pack(repeated, [[r] for r in flat]).to(device), pack(prompts, responses).to(device), token_ids,
        side // 2, side % 2 == 0, reference_logps, stored, examples, sum(map(len, prompts)) + sum(lengths),
    )  # fmt: skip


def steps(models: Models, pairs: Pairs, only: Sequence[str] = ()) -> dict[str, Step | str]:
    """The steps of all variants, or of those in `only`, by name. A variant whose package cannot be imported has the
    reason in place of its step."""
    makers: dict[str, Callable[[], Step]] = {
        "A": lambda: lambda: full_logits(models, pairs),
        "A0": lambda: full_logits_stored(models.student, pairs),
        "A0 rows": lambda: lambda: response_logits_stored(models.student, pairs),
        "B": lambda: lambda: fused(models.student, pairs, padded_hidden(models.student, pairs.padded)),
        "C": lambda: lambda: fused(models.student, pairs, packed_hidden(models.student, pairs.packed)),
        "D": lambda: lambda: fused(models.student, pairs, packed_hidden(models.student, pairs.shared)),
        "D lean": lambda: lambda: checkpointed(models.student, pairs),
        "TRL": lambda: trl_composed(models, pairs),
        "Liger": lambda: liger_composed(models, pairs),
        "TRL DPO": lambda: dpo_trainer(models, pairs),
    }
    made: dict[str, Step | str] = {}
    for name in only or makers:
        try:
            made[name] = makers[name]()
        except ImportError as error:
            made[name] = f"cannot be imported: {error}"
    return made


def full_logits(models: Models, pairs: Pairs) -> Terms:
    ids, mask = pairs.padded.ids, pairs.padded.mask

    def logprobs(model: PreTrainedModel) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)  # [N, L, V]

    def token_sums(logp: Tensor) -> Tensor:
        picked = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]  # [N, L - 1]
        return torch.where(pairs.labels[:, 1:] != IGNORED, picked, 0.0).sum(-1)

    logp = logprobs(models.student)
    with torch.no_grad():
        reference = token_sums(logprobs(models.reference))
        teacher_logp = logprobs(models.teacher)
    kl = kl_div(logp, teacher_logp, reduction="none", log_target=True).sum(-1)  # [N, L]
    return _terms(token_sums(logp), reference, kl.flatten()[pairs.padded.rows], pairs)


def full_logits_stored(student: PreTrainedModel, pairs: Pairs) -> Step:
    padded, stored = pairs.padded, pairs.targets
    # [N L, K + 1]: stored ids, and the next token
    ids = torch.cat(
        [stored.ids.new_zeros(padded.ids.numel(), stored.ids.shape[1]), padded.ids.view(-1, 1).roll(-1, 0)], 1
    )
    ids[padded.rows, :-1] = stored.ids

    def step() -> Terms:
        logits = student(input_ids=padded.ids, attention_mask=padded.mask, use_cache=False).logits.float()  # [N, L, V]
        logp = logits.log_softmax(-1).flatten(0, 1).gather(-1, ids)[padded.rows]  # [T, K + 1]
        kl = token_divergence(logp[:, :-1], None, stored, pairs.is_chosen, SETTINGS)
        loss, _ = pair_loss(
            logp[:, -1], kl, pairs.pair_index, pairs.is_chosen, pairs.reference_logps, pairs.n,
            settings=SETTINGS, denominators=pairs.denominators,
        )  # fmt: skip
        return {"loss": loss}

    return step


def response_logits_stored(student: PreTrainedModel, pairs: Pairs) -> Terms:
    padded = pairs.padded
    logits = student(input_ids=padded.ids, attention_mask=padded.mask, use_cache=False).logits.float()  # [N, L, V]
    loss, _ = joint_loss(
        logits.flatten(0, 1)[padded.rows], *_stored(pairs), settings=SETTINGS, denominators=pairs.denominators
    )
    return {"loss": loss}


def fused(student: PreTrainedModel, pairs: Pairs, hidden: Tensor) -> Terms:
    loss, _, _ = lm_head_joint_loss(
        hidden, output_matrix(student), *_stored(pairs), vocab=student.config.vocab_size, settings=SETTINGS,
        denominators=pairs.denominators,
    )  # fmt: skip
    return {"loss": loss}


def checkpointed(student: PreTrainedModel, pairs: Pairs) -> Terms:
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hidden = packed_hidden(student, pairs.shared)
    student.gradient_checkpointing_disable()
    return fused(student, pairs, hidden)


def trl_composed(models: Models, pairs: Pairs) -> Step:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    weight, teacher_weight = output_matrix(models.student), output_matrix(models.teacher)
    side = 2 * pairs.pair_index + (~pairs.is_chosen).long()  # [T]

    def per_sequence(logps: Tensor) -> Tensor:
        return logps.new_zeros(2 * pairs.n).index_add(0, side, logps)

    def step() -> Terms:
        hidden = padded_hidden(models.student, pairs.padded)  # [T, H]
        with torch.no_grad():
            teacher_hidden = padded_hidden(models.teacher, pairs.padded)
        logps = ChunkedLogProbFunction.apply(
            hidden, weight, None, pairs.token_ids, 1.0, CHUNK, None, 1.0, ("log_probs",)
        )[0]  # fmt: skip
        kl, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, 0.0)
        return _terms(per_sequence(logps), per_sequence(pairs.reference_logps), kl, pairs)

    return step


def liger_composed(models: Models, pairs: Pairs) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearJSDLoss

    compiled = models.student.device.type == "cuda"
    dpo_loss = LigerFusedLinearDPOLoss(beta=SETTINGS.beta, compiled=compiled)
    jsd_loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
    weight, reference_weight, teacher_weight = map(output_matrix, (models.student, models.reference, models.teacher))
    padded = pairs.padded
    order = torch.arange(2 * pairs.n).view(-1, 2).T.flatten()  # first all that are chosen
    target = pairs.labels[order, 1:]

    def all_hidden(model: PreTrainedModel) -> Tensor:
        return model.base_model(input_ids=padded.ids, attention_mask=padded.mask, use_cache=False).last_hidden_state

    def step() -> Terms:
        hidden = all_hidden(models.student)  # [N, L, H]
        with torch.no_grad():
            reference_hidden, teacher_hidden = all_hidden(models.reference), all_hidden(models.teacher)
        dpo, _ = dpo_loss(
            weight, hidden[order, :-1], target, ref_input=reference_hidden[order, :-1], ref_weight=reference_weight
        )
        terms = {"dpo": dpo}
        for name, side in (("kl_chosen", pairs.is_chosen), ("kl_rejected", ~pairs.is_chosen)):
            rows, ids = padded.rows[side], pairs.token_ids[side]
            student_rows, teacher_rows = (h.flatten(0, 1)[rows] for h in (hidden, teacher_hidden))
            terms[name] = jsd_loss(student_rows, weight, teacher_rows, teacher_weight, ids)
        return terms | {"loss": sum(terms.values())}

    return step


def dpo_trainer(models: Models, pairs: Pairs) -> Step:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    # The trainer requires a tokenizer and texts. The pairs, which are token ids, bypass them: they go to its collator
    # and its training step.
    words = Tokenizer(tokenizer_models.WordLevel({"<pad>": 0, "</s>": 1, "x": 2}, unk_token="x"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    on_cpu = models.student.device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            models.student, args=DPOConfig(
                folder, beta=SETTINGS.beta, precompute_ref_log_probs=True, max_length=None, report_to="none",
                disable_tqdm=True, gradient_checkpointing=models.student.is_gradient_checkpointing, use_cpu=on_cpu,
                bf16=not on_cpu,
            ),
            train_dataset=Dataset.from_list([{"prompt": "x", "chosen": "x", "rejected": "x"}]),
            processing_class=tokenizer,
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # as `train` would set it
    batch = trainer.data_collator(pairs.examples)

    def step() -> Terms:  # its backward pass is part of it
        loss = trainer.training_step(models.student, dict(batch))
        return {"loss": loss, "dpo": loss}

    return step


def _stored(pairs: Pairs) -> tuple:
    return pairs.token_ids, pairs.pair_index, pairs.is_chosen, pairs.reference_logps, pairs.targets, pairs.n


def _terms(policy: Tensor, reference: Tensor, kl: Tensor, pairs: Pairs) -> Terms:
    """The joint loss from sums of log-probs [N] and divergences [T]."""
    log_ratio = (policy - reference).view(-1, 2)
    terms = {
        "dpo": -logsigmoid(SETTINGS.beta * (log_ratio[:, 0] - log_ratio[:, 1])).mean(),
        "kl_chosen": kl[pairs.is_chosen].mean(),
        "kl_rejected": kl[~pairs.is_chosen].mean(),
    }
    return terms | {"loss": sum(terms.values())}
