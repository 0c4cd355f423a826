"""Teacher-forced scoring of stored responses: token ids in, logits at every response position out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from nbg_core.losses import token_logps
from nbg_core.models import load_model, load_tokenizer, pad, response_logits
from nbg_core.run import Run


@dataclass(frozen=True)
class Scored:
    """One forward pass: `logits` [T, V] over the responses of `samples` behind one another, `token_ids` [T]."""

    samples: pl.DataFrame
    logits: Tensor
    token_ids: Tensor
    lengths: list[int]


class Scorer:
    """A model that scores `samples` (columns sample_id, prompt_token_ids, token_ids)."""

    def __init__(self, run: Run, path: Path):
        profile = run.profile
        if profile.threads:
            torch.set_num_threads(profile.threads)
        trust = profile.models.trust_remote_code
        tokenizer = load_tokenizer(path, trust_remote_code=trust)
        self.model = load_model(path, dtype=profile.models.dtype, trust_remote_code=trust)
        self.vocab = len(tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.batch_tokens = profile.teacher.batch_tokens

    @torch.inference_mode()
    def score(self, samples: pl.DataFrame) -> Iterator[Scored]:
        """Forward passes over `samples`, longest first, at most `batch_tokens` padded tokens each."""
        samples = samples.with_columns(
            (pl.col("prompt_token_ids").list.len() + pl.col("token_ids").list.len()).alias("_length")
        ).sort(["_length", "sample_id"], descending=[True, False])
        start = 0
        while start < samples.height:
            size = max(1, self.batch_tokens // samples["_length"][start])
            batch = samples.slice(start, size).drop("_length")
            start += size
            responses = batch["token_ids"].to_list()
            ids, mask, rows = pad(batch["prompt_token_ids"].to_list(), responses, self.pad_id)
            device = self.model.device
            logits = response_logits(self.model, ids.to(device), mask.to(device), rows.to(device), self.vocab)
            tokens = torch.tensor([t for r in responses for t in r], device=device)
            yield Scored(batch, logits, tokens, [len(r) for r in responses])


def response_logprobs(run: Run, path: Path, samples: pl.DataFrame, what: str) -> Iterator[pl.DataFrame]:
    """Frames (sample_id, token_logprobs) for `samples`, a chunk of `teacher.chunk_samples` at a time.

    Log-probabilities are at temperature 1, in nats, one per response token."""
    if samples.is_empty():
        return
    scorer = Scorer(run, path)
    progress = run.progress(what, samples.height)
    for chunk in samples.sort("sample_id").iter_slices(run.profile.teacher.chunk_samples):
        ids, logprobs = [], []
        for scored in scorer.score(chunk):
            values = token_logps(scored.logits, scored.token_ids).split(scored.lengths)
            ids += scored.samples["sample_id"].to_list()
            logprobs += [v.tolist() for v in values]
            progress.advance(len(values))
        yield pl.DataFrame(
            {"sample_id": ids, "token_logprobs": logprobs},
            schema={"sample_id": pl.String, "token_logprobs": pl.List(pl.Float32)},
        )


def samples_of_pairs(run: Run, slice: str, snapshot: int) -> pl.DataFrame:
    """The responses of every pair of a slice, once each: sample_id, prompt_token_ids, token_ids."""
    return run.lake.sql(
        "SELECT sample_id, prompt_token_ids, token_ids FROM samples WHERE sample_id IN "
        "(SELECT chosen_id FROM pairs WHERE slice = $1 UNION SELECT rejected_id FROM pairs WHERE slice = $1) "
        "ORDER BY sample_id",
        [slice],
        snapshot=snapshot,
    )
