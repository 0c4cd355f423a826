"""What a sampler is: prompts as token ids in, responses as token ids with log-probs out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from nbg_core.modeling.chat import encode_prompt
from nbg_core.modeling.loading import load_tokenizer


@dataclass(frozen=True)
class Request:
    """`len(seeds)` responses to one prompt, each drawn with its own seed."""

    prompt_token_ids: list[int]
    seeds: list[int]


@dataclass(frozen=True)
class Response:
    """A response. `logprobs` are of the model's own distribution (temperature 1, nothing cut), in nats."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # 'stop' or 'length'


@dataclass(frozen=True)
class Decoding:
    """Sampling parameters; temperature 0 is greedy."""

    temperature: float
    top_p: float
    max_tokens: int


Drawn = tuple[int, int, Response]
"""Number of the request, number of its seed, and the response."""


class Sampler(ABC):
    """The model at `path`, served, and its tokenizer."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False):
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        self.vocab = len(self.tokenizer)

    @abstractmethod
    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[Drawn]:
        """One response per seed of each request, as they finish. A seed decides its response, whatever the batch."""

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat, ready for the assistant's turn."""
        return encode_prompt(self.tokenizer, messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        # A list of ids is one text; transformers returns a list of texts for a list of lists.
        return cast(str, self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Response]]:
        """All responses to each request, in its order of seeds."""
        drawn = {(i, j): response for i, j, response in self.stream(requests, decoding)}
        return [[drawn[i, j] for j in range(len(request.seeds))] for i, request in enumerate(requests)]
