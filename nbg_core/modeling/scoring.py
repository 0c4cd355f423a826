"""Teacher-forced scoring of stored responses: token ids in, hidden states at every response position out.

Shapes: T response tokens of a forward pass, concatenated; H hidden; V vocabulary; c rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from nbg_core.config.profile import Profile
from nbg_core.lineage.run import Run
from nbg_core.modeling.chat import padding_id
from nbg_core.modeling.forward import collate, no_packing, output_matrix, response_hidden
from nbg_core.modeling.lm_head import lm_head_logps, logit_tiles
from nbg_core.modeling.loading import load_model, load_tokenizer
from nbg_core.modeling.packing import supports_packing


@dataclass(frozen=True)
class Scored:
    """One forward pass over the responses of `samples`, concatenated in their order."""

    samples: pl.DataFrame
    hidden: Tensor
    """[T, H]: row t predicts token_ids[t]."""
    token_ids: Tensor
    """[T] int64."""
    lengths: list[int]


class LogprobModel:
    """A model, teacher or reference, that gives the log-probs of `samples` (columns sample_id, prompt_token_ids,
    token_ids)."""

    def __init__(self, profile: Profile, path: Path, log: Callable[[str], None] = print, n_beside: int = 1):
        """`n_beside`: number of processes with such a model that share this machine's threads.

        Raises FileNotFoundError or ValueError for a model that is not there or cannot be scored."""
        if profile.threads:
            torch.set_num_threads(max(1, profile.threads // n_beside))
        trust = profile.models.trust_remote_code
        tokenizer = load_tokenizer(path, trust_remote_code=trust)
        self.model = load_model(path, dtype=profile.models.dtype, trust_remote_code=trust)
        self.weight = output_matrix(self.model)
        self.vocab = len(tokenizer)
        self.packed = supports_packing(self.model.config)
        if not self.packed:
            log(no_packing(self.model.config))
        self.pad_id = padding_id(tokenizer)
        self.batch_tokens = profile.teacher.batch_tokens

    @torch.inference_mode()
    def score(self, samples: pl.DataFrame) -> Iterator[Scored]:
        """Forward passes over `samples`, of at most `batch_tokens` tokens; a longer response gets one of its own."""
        for batch in self._batches(samples):
            prompts, responses = batch["prompt_token_ids"].to_list(), batch["token_ids"].to_list()
            inputs = collate(prompts, responses, None if self.packed else self.pad_id).to(self.model.device)
            tokens = torch.tensor([t for r in responses for t in r], device=self.model.device)
            yield Scored(batch, response_hidden(self.model, inputs), tokens, [len(r) for r in responses])

    @torch.inference_mode()
    def logps(self, scored: Scored) -> Tensor:
        """Log p [T] of the responses' own tokens, float32, by the reduction that the trainer uses."""
        return lm_head_logps(scored.hidden, self.weight, scored.token_ids, vocab=self.vocab)

    def logits(self, scored: Scored) -> Iterator[Tensor]:
        """Tiles [c, V] float32 of the logits at the T response positions; each may be overwritten."""
        return logit_tiles(scored.hidden, self.weight, vocab=self.vocab)

    def _batches(self, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Batches of `samples`, longest first; for packing, responses with the same prompt are kept together."""
        n_prompt, n_response = pl.col("prompt_token_ids").list.len(), pl.col("token_ids").list.len()
        if self.packed:
            key = pl.struct("prompt_token_ids").hash()  # puts equal prompts together; `collate` compares them in full
            samples = samples.with_columns(n_prompt.alias("_n"), key.alias("_key")).sort(
                ["_n", "_key", "sample_id"], descending=[True, False, False]
            )
            new = (pl.col("_key") != pl.col("_key").shift()).fill_null(True)
            shared = samples.select(pl.when(new).then(0).otherwise(n_prompt)).to_series().to_numpy()
            cost = samples.select(n_prompt + n_response - 1).to_series().to_numpy()
        else:
            samples = samples.with_columns((n_prompt + n_response).alias("_n"), pl.lit(0).alias("_key"))
            samples = samples.sort(["_n", "sample_id"], descending=[True, False])
            cost = samples["_n"].to_numpy()
        samples = samples.drop("_n", "_key")
        start = total = 0
        for i, alone in enumerate(cost.tolist()):  # tokens of a response that shares no prompt
            total = total + alone - int(shared[i]) if self.packed else (i - start + 1) * int(cost[start])
            if total > self.batch_tokens and i > start:
                yield samples[start:i]
                start, total = i, alone
        if samples.height:
            yield samples[start:]


def response_logprobs(run: Run, path: Path, samples: pl.DataFrame, what: str) -> Iterator[pl.DataFrame]:
    """Frames (sample_id, token_logprobs) for `samples`, a chunk of `teacher.chunk_samples` at a time.

    Log-probabilities are at temperature 1, in nats, one per response token."""
    if samples.is_empty():
        return
    model = LogprobModel(run.profile, path, run.log)
    progress = run.progress(what, samples.height)
    for chunk in samples.sort("sample_id").iter_slices(run.profile.teacher.chunk_samples):
        ids, logprobs = [], []
        for scored in model.score(chunk):
            values = model.logps(scored).split(scored.lengths)
            ids += scored.samples["sample_id"].to_list()
            logprobs += [v.tolist() for v in values]
            progress.advance(len(values))
        yield pl.DataFrame(
            {"sample_id": ids, "token_logprobs": logprobs},
            schema={"sample_id": pl.String, "token_logprobs": pl.List(pl.Float32)},
        )
