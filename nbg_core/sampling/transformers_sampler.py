"""The embedded sampler: a transformers model in this process, batched, with a key-value cache.

The draw is our own, not `generate`'s: each response has its own stream of uniform numbers, derived from its seed, so
that neither batch size nor order nor what else was asked for changes it. The prompt is computed once for all the
responses that share it. Shapes: B responses, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nbg_core.config.profile import Profile
from nbg_core.modeling.chat import stop_ids
from nbg_core.modeling.loading import load_model
from nbg_core.sampling.sampler import Decoding, Drawn, Request, Response, Sampler


class TransformersSampler(Sampler):
    def __init__(self, profile: Profile, path: Path, batch_size: int):
        if profile.threads:
            torch.set_num_threads(profile.threads)
        trust = profile.models.trust_remote_code
        super().__init__(path, trust_remote_code=trust)
        self.model = load_model(path, dtype=profile.models.dtype, trust_remote_code=trust)
        stop = stop_ids(self.model.generation_config, self.tokenizer)
        self.stop = torch.tensor(sorted(stop), device=self.model.device)
        self.batch_size = batch_size

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Drawn]:
        """See Sampler.stream. Requests are grouped up to `batch_size` responses (one request is never split)."""
        start = 0
        for end in range(1, len(requests) + 1):
            batch = requests[start : end + 1]
            if end == len(requests) or sum(len(r.seeds) for r in batch) > self.batch_size:
                for i, responses in enumerate(self._batch(requests[start:end], decoding), start):
                    yield from ((i, j, response) for j, response in enumerate(responses))
                start = end

    @torch.inference_mode()
    def _batch(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Response]]:
        device = self.model.device
        width = max(len(r.prompt_token_ids) for r in requests)
        ids = torch.zeros((len(requests), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, r in enumerate(requests):  # padded on the left, so that all responses start at one column
            ids[i, width - len(r.prompt_token_ids) :] = torch.tensor(r.prompt_token_ids)
            mask[i, width - len(r.prompt_token_ids) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        owner = torch.tensor([i for i, r in enumerate(requests) for _ in r.seeds], device=device)  # [B]
        cache = out.past_key_values
        cache.batch_select_indices(owner)
        logits, mask, position = out.logits[owner, -1], mask[owner], positions[owner, -1:]
        uniforms = torch.from_numpy(_uniforms([s for r in requests for s in r.seeds], decoding.max_tokens)).to(device)

        tokens, logprobs, running = [], [], torch.ones(len(owner), dtype=torch.bool, device=device)
        for step in range(decoding.max_tokens):
            token, logprob = _draw(logits[:, : self.vocab].float(), uniforms[:, step], decoding)
            tokens.append(token)
            logprobs.append(logprob)
            running &= ~torch.isin(token, self.stop)
            if not running.any() or step + 1 == decoding.max_tokens:
                break
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], 1)
            position = position + 1
            out = self.model(input_ids=token[:, None], attention_mask=mask, position_ids=position,
                             past_key_values=cache, use_cache=True)  # fmt: skip
            logits = out.logits[:, -1]
        return self._responses(requests, torch.stack(tokens, 1), torch.stack(logprobs, 1))

    def _responses(self, requests: Sequence[Request], tokens: Tensor, logprobs: Tensor) -> list[list[Response]]:
        ends = torch.isin(tokens, self.stop)
        stopped = ends.any(1)
        lengths = torch.where(stopped, ends.int().argmax(1) + 1, tokens.shape[1]).tolist()
        flat = iter(
            Response(t[:n], p[:n], "stop" if s else "length")
            for t, p, n, s in zip(tokens.tolist(), logprobs.tolist(), lengths, stopped.tolist(), strict=True)
        )
        return [[next(flat) for _ in r.seeds] for r in requests]


def _uniforms(seeds: list[int], n: int) -> np.ndarray:
    """[B, n] uniform numbers in [0, 1), a stream per seed."""
    return np.stack([np.random.Generator(np.random.Philox(key=s)).random(n) for s in seeds])


def _draw(logits: Tensor, u: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Token ids [B] drawn from logits [B, V] with uniform numbers u [B], and their log-probs at temperature 1."""
    logp = logits.log_softmax(-1)
    if decoding.temperature == 0:
        token = logits.argmax(-1)
    else:
        p = (logits.double() / decoding.temperature).softmax(-1)
        if decoding.top_p < 1:
            ordered = p.sort(-1, descending=True)
            before = ordered.values.cumsum(-1) - ordered.values
            p = p.scatter(-1, ordered.indices, ordered.values.masked_fill(before >= decoding.top_p, 0))
        cdf = p.cumsum(-1)
        last = (p > 0).int().cumsum(-1).argmax(-1, keepdim=True)  # rounding must not pick an impossible id
        token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).minimum(last)[:, 0]
    return token, logp.gather(-1, token[:, None])[:, 0]
