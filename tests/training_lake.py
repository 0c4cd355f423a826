"""A small lake that is ready to train on: tiny random models, synthetic pairs, rows scored by the real stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from nbg_core.base import ids
from nbg_core.config import identity
from nbg_core.config.profile import Profile
from nbg_core.config.slices import slice_names
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Write
from nbg_core.lake.teacher_columns import GAP_ZERO
from nbg_core.lineage.policy import current_policy
from nbg_core.lineage.run import Run
from nbg_core.modeling.loading import load_model
from nbg_core.reference import stage as reference_stage
from nbg_core.teacher import stage as teacher_stage
from nbg_core.training.pair_files import write_pair_files
from nbg_core.training.request import TrainingRequest

WORDS = 40
"""Tokens of the tokenizer; the output matrix has more rows, as it does in real families."""


def make_model(
    folder: Path, seed: int, *, architecture: str = "llama", hidden: int = 32, rows: int = 48, tied: bool = True,
    std: float = 0.15,
) -> Path:  # fmt: skip
    torch.manual_seed(seed)
    more = {} if architecture == "gpt2" else dict(intermediate_size=2 * hidden, num_key_value_heads=2)
    more |= dict(sliding_window=5) if architecture == "gemma3_text" else {}
    config = AutoConfig.for_model(
        architecture, vocab_size=rows, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=std,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, **more,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocab = {"<|pad|>": 0, "<|end|>": 1} | {f"w{i}": i for i in range(2, WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="w2")), pad_token="<|pad|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def make_profile(root: Path, *, n_pairs: int = 12, model: dict | None = None, **training) -> Profile:
    """A profile below `root` and its lake, with `n_pairs` pairs in slices alpha and beta, scored."""
    for slice_name in ("alpha", "beta"):
        (root / "queries").mkdir(parents=True, exist_ok=True)
        (root / "queries" / f"{slice_name}.jsonl").touch()
    make_model(root / "student", 1, **(model or {}))
    make_model(root / "teacher", 2, **(model or {}))
    profile = Profile.model_validate({
        "name": "test", "root": root, "models": {"student": "student", "teacher": "teacher"},
        "paths": {"queries": "queries", "checkpoints": "checkpoints", "work": "work"},
        "lake": {"catalog": "sqlite:lake/catalog.sqlite", "data_path": "lake/files"},
        "teacher": {"k_head": 6, "m_tail": 4, "min_weight": 0, "logprob_bits": 23}, "training": training, "threads": 1,
    })  # fmt: skip
    run = Run(profile, Lake.of(profile), log=lambda line: None)
    rng = np.random.default_rng(0)
    for slice_name, n in (("alpha", n_pairs - n_pairs // 3), ("beta", n_pairs // 3)):
        add_pairs(run, slice_name, n, rng)
        teacher_stage.materialise(run, slice_name)
        reference_stage.materialise(run, slice_name)
    return profile


def add_pairs(run: Run, slice_name: str, n: int, rng: np.random.Generator) -> None:
    """Commit `n` pairs of random token ids: prompts of 3 to 8 tokens, responses of 2 to 11."""
    samples, pairs = [], []
    model = run.policy.model_id
    for i in range(n):
        query = ids.query_id([{"role": "user", "content": f"{slice_name} {i}"}])
        prompt = rng.integers(2, WORDS, rng.integers(3, 9)).tolist()
        pair = [ids.sample_id(query, model, "sampling", k) for k in range(2)]
        for k, sample in enumerate(pair):
            tokens = [*rng.integers(2, WORDS, rng.integers(1, 11)).tolist(), 1]
            samples.append({
                "slice": slice_name, "sample_id": sample, "query_id": query, "source": "student", "model_id": model,
                "sampling_id": "sampling", "sample_index": k, "seed": 0, "prompt_token_ids": prompt,
                "token_ids": tokens, "logprobs": [-1.0] * len(tokens), "finish_reason": "stop", "text": "",
            })  # fmt: skip
        pairs.append({
            "slice": slice_name, "pair_id": ids.pair_id(*pair), "query_id": query, "chosen_id": pair[0],
            "rejected_id": pair[1], "chosen_score": 1.0, "rejected_score": 0.0, "margin": 1.0,
        })  # fmt: skip
    writes = [Write("samples", pl.DataFrame(samples)), Write("pairs", pl.DataFrame(pairs))]
    run.commit("filtered_pairs", slice_name, writes, data_version=ids.content_version([p["pair_id"] for p in pairs]))


def request_of(profile: Profile, name: str, **training) -> TrainingRequest:
    """A request to train on everything in the lake, with its own work folder and changed training settings.

    The training set is written, as `launch` does it."""
    lake = Lake.of(profile)
    policy = current_policy(lake, profile)
    settings = {**profile.training.model_dump(), **training}
    work = profile.resolve(profile.paths.work) / name
    work.mkdir(parents=True, exist_ok=True)
    request = TrainingRequest(
        training_id=name, catalog=lake.catalog, data_path=lake.data_path, snapshot=lake.snapshot(),
        slices=slice_names(profile), policy_id=policy.model_id, policy_path=policy.path,
        teacher_id=ids.model_id(profile.resolve(profile.models.teacher)), storage_id=identity.storage_id(profile),
        scoring_id=identity.scoring_id(profile), temperature=profile.teacher.temperature, training=settings, work=work,
        threads=profile.threads,
    )  # fmt: skip
    write_pair_files(lake, request, lambda line: None)
    return request


def where(request: TrainingRequest) -> dict[str, str]:
    return dict(teacher_id=request.teacher_id, storage_id=request.storage_id, reference_id=request.policy_id,
                scoring_id=request.scoring_id)  # fmt: skip


def responses_of(request: TrainingRequest) -> pl.DataFrame:
    """What the lake holds of the pairs, two rows a pair, chosen first; read in one query, not as training reads it."""
    return Lake(request.catalog, request.data_path).sql(
        """
        WITH members AS (SELECT pair_id, slice, unnest([0, 1]) AS side, unnest([chosen_id, rejected_id]) AS sample_id
                         FROM pairs)
        SELECT m.*, s.prompt_token_ids, s.token_ids, t.* EXCLUDE (sample_id, slice, model_id, token_logprobs,
               settings_id, materialisation_id), r.token_logprobs AS reference_logprobs
        FROM members m JOIN samples s USING (sample_id) JOIN teacher_logits t USING (sample_id)
        JOIN reference_logprobs r USING (sample_id)
        WHERE t.model_id = ? AND t.settings_id = ? AND r.model_id = ? AND r.settings_id = ? ORDER BY pair_id, side""",
        list(where(request).values()), snapshot=request.snapshot,
    )  # fmt: skip


def naive_gradients(request: TrainingRequest, pairs: np.ndarray) -> dict[str, torch.Tensor]:
    """Of the loss of one optimizer step on `pairs` (places in order of pair_id), by parameter, float64: response by
    response, without padding, position by position, from the definitions."""
    model = load_model(request.policy_path, dtype="float64")
    loss, responses = request.training.loss, responses_of(request)
    sides = [[responses.row(2 * int(pair) + side, named=True) for pair in pairs] for side in range(2)]
    counts = [sum(len(r["token_ids"]) for r in side) for side in sides]
    total = torch.zeros((), dtype=torch.float64)
    for both in zip(*sides, strict=True):
        reward = []
        for r, weight, count in zip(both, (loss.w_pos, loss.w_neg), counts, strict=True):
            ids_ = torch.tensor([r["prompt_token_ids"] + r["token_ids"]])
            logp = model(ids_).logits[0, len(r["prompt_token_ids"]) - 1 : -1, :WORDS].log_softmax(-1)
            policy = sum(logp[t, token] for t, token in enumerate(r["token_ids"]))
            reward.append(loss.beta * (policy - sum(r["reference_logprobs"])))
            at = 0
            for t, (h, k) in enumerate(zip(r["head_counts"], r["tail_counts"], strict=True)):
                gaps = r["entry_gaps"][at : at + h + k]
                entry_ids = [
                    int(i)
                    for part in (gaps[:h], gaps[h:])
                    for i in np.cumsum(np.array(part, dtype=np.int64) - GAP_ZERO)
                ]
                for e in range(at, at + h + k):
                    q = np.exp(r["entry_logprobs"][e]) if e < at + h else np.exp(r["tail_logmass"][t]) / k
                    total = total + weight * q * (r["entry_logprobs"][e] - logp[t, entry_ids[e - at]]) / count
                at += h + k
            if r is both[0]:
                total = total - loss.nll_coef * policy / counts[0]
        total = total - loss.w_dpo * torch.nn.functional.logsigmoid(reward[0] - reward[1]) / len(pairs)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}
