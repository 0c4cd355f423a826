"""The sampler of backend `transformers`: a model in this process, batched, with a key-value cache.

Tokens are drawn here and not by transformers' `generate`: each response has its own stream of uniform numbers, derived
from its seed, so that it does not depend on batch size, order or the other requests. A prompt's forward pass is shared
by all its responses.

Shapes: R requests (prompts), N responses of all requests, L prompt tokens of the longest request plus tokens drawn so
far, S tokens of the longest response, V vocabulary.
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
from nbg_core.sampling.sampler import Decoding, Drawn, Response, Sampler, SamplingRequest


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

    def stream(self, requests: Sequence[SamplingRequest], decoding: Decoding) -> Iterator[Drawn]:
        """See Sampler.stream. A batch has consecutive requests with at most `batch_size` responses in all, but at least
        one request."""
        start = 0
        for end in range(1, len(requests) + 1):
            batch = requests[start : end + 1]
            if end == len(requests) or sum(len(r.seeds) for r in batch) > self.batch_size:
                for i, responses in enumerate(self._batch(requests[start:end], decoding), start):
                    yield from ((i, j, response) for j, response in enumerate(responses))
                start = end

    @torch.inference_mode()
    def _batch(self, requests: Sequence[SamplingRequest], decoding: Decoding) -> list[list[Response]]:
        """The responses to each request of one batch."""
        device = self.model.device
        width = max(len(r.prompt_token_ids) for r in requests)
        token_ids = torch.zeros((len(requests), width), dtype=torch.long)  # [R, L]
        mask = torch.zeros_like(token_ids)  # [R, L], 1 where there is a token
        for i, r in enumerate(requests):  # padded on the left, so that all responses start in the same column
            token_ids[i, width - len(r.prompt_token_ids) :] = torch.tensor(r.prompt_token_ids)
            mask[i, width - len(r.prompt_token_ids) :] = 1
        token_ids, mask = token_ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # [R, L]
        out = self.model(
            input_ids=token_ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        request_of = torch.tensor([i for i, r in enumerate(requests) for _ in r.seeds], device=device)  # [N]
        cache = out.past_key_values
        cache.batch_select_indices(request_of)  # from one row per request to one per response
        logits, mask = out.logits[request_of, -1], mask[request_of]  # [N, columns of the logits], [N, L]
        position = positions[request_of, -1:]  # [N, 1]
        seeds = [seed for r in requests for seed in r.seeds]
        uniforms = torch.from_numpy(_uniforms(seeds, decoding.max_tokens)).to(device)  # [N, max_tokens]

        tokens, logprobs = [], []  # [N] for each step
        running = torch.ones(len(request_of), dtype=torch.bool, device=device)  # [N]
        for step in range(decoding.max_tokens):
            token, logprob = _draw(logits[:, : self.vocab].float(), uniforms[:, step], decoding)
            tokens.append(token)
            logprobs.append(logprob)
            running &= ~torch.isin(token, self.stop)
            if not running.any() or step + 1 == decoding.max_tokens:
                break
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], 1)  # [N, L], L grows by one
            position = position + 1
            out = self.model(input_ids=token[:, None], attention_mask=mask, position_ids=position,
                             past_key_values=cache, use_cache=True)  # fmt: skip
            logits = out.logits[:, -1]
        return self._responses(requests, torch.stack(tokens, 1), torch.stack(logprobs, 1))

    def _responses(self, requests: Sequence[SamplingRequest], tokens: Tensor, logprobs: Tensor) -> list[list[Response]]:
        """The responses to each request, from tokens [N, S] and logprobs [N, S]; each ends at its first stop token."""
        ends = torch.isin(tokens, self.stop)  # [N, S]
        stopped = ends.any(1)  # [N]
        lengths = torch.where(stopped, ends.int().argmax(1) + 1, tokens.shape[1])  # [N]
        columns = (tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist())
        responses = iter(
            Response(token_ids[:n], own_logprobs[:n], "stop" if has_stopped else "length")
            for token_ids, own_logprobs, n, has_stopped in zip(*columns, strict=True)
        )
        return [[next(responses) for _ in r.seeds] for r in requests]


def _uniforms(seeds: list[int], n: int) -> np.ndarray:
    """Uniform numbers [N, n] in [0, 1), float64: one stream for each of N seeds."""
    return np.stack([np.random.Generator(np.random.Philox(key=seed)).random(n) for seed in seeds])


def _draw(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Token ids [N] drawn from logits [N, V] with uniform numbers [N], and their log-probs [N] at temperature 1."""
    logp = logits.log_softmax(-1)  # [N, V]
    if decoding.temperature == 0:
        token = logits.argmax(-1)  # [N]
    else:
        p = (logits.double() / decoding.temperature).softmax(-1)  # [N, V]
        if decoding.top_p < 1:
            ordered = p.sort(-1, descending=True)
            before = ordered.values.cumsum(-1) - ordered.values  # [N, V], mass of all more probable tokens
            p = p.scatter(-1, ordered.indices, ordered.values.masked_fill(before >= decoding.top_p, 0))
        cdf = p.cumsum(-1)  # [N, V]
        last = (p > 0).int().cumsum(-1).argmax(-1, keepdim=True)  # [N, 1], last id with p > 0: rounding may pass it
        token = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).minimum(last)[:, 0]  # [N]
    return token, logp.gather(-1, token[:, None])[:, 0]
