"""The sampler that speaks to vLLM servers: token ids in, token ids and log-probs out, never text.

Every response is a request of its own with its own seed: the server keeps a prompt's keys and values, so the prompt
is computed once for the responses that share it, and a response that failed is asked for again alone. A seed decides
its response up to rounding: vLLM's kernels round by the batch, so that a draw at the edge of two tokens can fall
either way. Log-probs are of the model's own distribution (vLLM's logprobs_mode raw_logprobs, checked by the client);
unlike the transformers sampler's, they count the columns of a padded output matrix, whose mass is nothing and which
are never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbg_core.modeling.chat import stop_ids
from nbg_core.modeling.loading import generation_config, output_width
from nbg_core.sampling.sampler import Decoding, Drawn, Request, Response, Sampler
from nbg_core.vllm.client import BadAnswer, Client


class VllmSampler(Sampler):
    def __init__(self, client: Client, path: Path, *, trust_remote_code: bool = False):
        super().__init__(path, trust_remote_code=trust_remote_code)
        self.client = client
        self.stop = stop_ids(generation_config(path, trust_remote_code=trust_remote_code), self.tokenizer)
        width = output_width(path, trust_remote_code=trust_remote_code)
        self._never = {str(i): -100.0 for i in range(self.vocab, width)}

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Drawn]:
        """See Sampler.stream."""
        asked = [(i, j) for i, request in enumerate(requests) for j in range(len(request.seeds))]
        bodies = (self._body(requests[i], requests[i].seeds[j], decoding) for i, j in asked)

        def parse(number: int, choice: dict) -> Response:
            return self._response(choice, requests[asked[number][0]], decoding)

        for number, response in self.client.complete(bodies, parse):
            yield (*asked[number], response)

    def _body(self, request: Request, seed: int, decoding: Decoding) -> dict:
        """All sampling parameters: what is left out, a server may take from the model's generation config."""
        return {
            "prompt": request.prompt_token_ids, "seed": seed, "max_tokens": decoding.max_tokens, "logprobs": 0,
            "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "stop_token_ids": sorted(self.stop), "return_token_ids": True, "skip_special_tokens": False,
        } | ({"logit_bias": self._never} if self._never else {})  # fmt: skip

    def _response(self, choice: dict, request: Request, decoding: Decoding) -> Response:
        """Raises BadAnswer for what cannot be a response to the request."""
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if choice.get("prompt_token_ids") != request.prompt_token_ids:
            raise BadAnswer("an answer to another prompt")
        if not ids or not logprobs or len(ids) != len(logprobs):
            raise BadAnswer(f"{len(ids or [])} tokens with {len(logprobs or [])} log-probs")
        if not all(isinstance(t, int) and 0 <= t < self.vocab for t in ids):
            raise BadAnswer(f"token ids up to {max(ids)}, but the tokenizer has {self.vocab}")
        if not all(isinstance(p, int | float) and math.isfinite(p) and p <= 1e-3 for p in logprobs):
            raise BadAnswer("log-probs that are not numbers, or above 0")
        ends = [i for i, t in enumerate(ids) if t in self.stop]
        whole = ends == [len(ids) - 1] if reason == "stop" else not ends and len(ids) == decoding.max_tokens
        if reason not in ("stop", "length") or not whole or len(ids) > decoding.max_tokens:
            raise BadAnswer(
                f"{len(ids)} tokens of at most {decoding.max_tokens}, finish reason {reason!r}, end tokens at {ends}"
            )
        return Response(ids, [min(float(p), 0.0) for p in logprobs], reason)
