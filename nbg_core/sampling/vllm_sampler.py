"""The sampler of backend `vllm`: sends token ids to vLLM servers and gets token ids and log-probabilities, never text.

Every response is an HTTP request of its own, with its own seed, so that a response that failed can be asked for again
alone. The server caches keys and values, so a prompt is computed once for all its responses.

A seed decides its response up to rounding: vLLM's results are rounded differently in different batches, so a draw at
the boundary between two tokens can fall either way. Log-probabilities are of the model's own distribution (vLLM's
logprobs_mode raw_logprobs, which the client checks). Unlike those of the transformers sampler, they are normalised over
padding columns of the logits too; these have practically no mass, and their ids are never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbg_core.modeling.chat import stop_ids
from nbg_core.modeling.loading import generation_config, output_width
from nbg_core.sampling.sampler import Decoding, Drawn, Response, Sampler, SamplingRequest
from nbg_core.vllm.client import BadAnswer, Client


class VllmSampler(Sampler):
    def __init__(self, client: Client, path: Path, *, trust_remote_code: bool = False):
        super().__init__(path, trust_remote_code=trust_remote_code)
        self.client = client
        self.stop = stop_ids(generation_config(path, trust_remote_code=trust_remote_code), self.tokenizer)
        width = output_width(path, trust_remote_code=trust_remote_code)
        self._never_drawn = {str(i): -100.0 for i in range(self.vocab, width)}  # logit biases of padding columns

    def stream(self, requests: Sequence[SamplingRequest], decoding: Decoding) -> Iterator[Drawn]:
        """See Sampler.stream."""
        asked = [(i, j) for i, request in enumerate(requests) for j in range(len(request.seeds))]
        bodies = (self._body(requests[i], requests[i].seeds[j], decoding) for i, j in asked)

        def parse(number: int, choice: dict) -> Response:
            return self._response(choice, requests[asked[number][0]], decoding)

        for number, response in self.client.complete(bodies, parse):
            yield (*asked[number], response)

    def _body(self, request: SamplingRequest, seed: int, decoding: Decoding) -> dict:
        """The body of the HTTP request for one response.

        It sets every sampling parameter, because for a missing one a server may use the model's generation config."""
        return {
            "prompt": request.prompt_token_ids, "seed": seed, "max_tokens": decoding.max_tokens, "logprobs": 0,
            "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "stop_token_ids": sorted(self.stop), "return_token_ids": True, "skip_special_tokens": False,
        } | ({"logit_bias": self._never_drawn} if self._never_drawn else {})  # fmt: skip

    def _response(self, choice: dict, request: SamplingRequest, decoding: Decoding) -> Response:
        """The response in a server's answer. Raises BadAnswer for what cannot be a response to the request."""
        token_ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if choice.get("prompt_token_ids") != request.prompt_token_ids:
            raise BadAnswer("its prompt_token_ids are not those that were sent")
        if not token_ids or not logprobs or len(token_ids) != len(logprobs):
            raise BadAnswer(f"{len(token_ids or [])} tokens with {len(logprobs or [])} log-probs")
        if not all(isinstance(t, int) and 0 <= t < self.vocab for t in token_ids):
            raise BadAnswer(f"token ids up to {max(token_ids)}, but the tokenizer has {self.vocab}")
        if not all(isinstance(p, int | float) and math.isfinite(p) and p <= 1e-3 for p in logprobs):
            raise BadAnswer("log-probs that are not numbers, or above 0")
        n = len(token_ids)
        ends = [i for i, t in enumerate(token_ids) if t in self.stop]
        whole = ends == [n - 1] if reason == "stop" else not ends and n == decoding.max_tokens
        if reason not in ("stop", "length") or not whole or n > decoding.max_tokens:
            raise BadAnswer(
                f"{n} tokens of at most {decoding.max_tokens}, finish reason {reason!r}, end tokens at {ends}"
            )
        return Response(token_ids, [min(float(p), 0.0) for p in logprobs], reason)
