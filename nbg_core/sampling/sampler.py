"""The interface of samplers, which take prompts as token ids and give responses as token ids with log-probabilities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from nbg_core.modeling.chat import encode_prompt
from nbg_core.modeling.loading import load_tokenizer


@dataclass(frozen=True)
class SamplingRequest:
    """Asks for `len(seeds)` responses to one prompt, each drawn with its own seed."""

    prompt_token_ids: list[int]
    seeds: list[int]


@dataclass(frozen=True)
class Response:
    """A response to a prompt."""

    token_ids: list[int]
    logprobs: list[float]
    """Log-probability of each token in nats, under the model's own distribution: temperature 1, no top-p."""
    finish_reason: str
    """'stop' if it ends with a stop token, 'length' if it was cut off at `max_tokens`."""


@dataclass(frozen=True)
class Decoding:
    """Sampling parameters."""

    temperature: float
    """0 is greedy."""
    top_p: float
    """Nucleus sampling: the mass of the tokens that are drawn from; 1 draws from all tokens."""
    max_tokens: int
    """Maximum response length, in tokens."""


Drawn = tuple[int, int, Response]
"""(index of the request, index of the seed in it, response)."""


class Sampler(ABC):
    """Draws responses from the model at `path`, and holds its tokenizer."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False):
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        self.vocab = len(self.tokenizer)

    @abstractmethod
    def stream(self, requests: Sequence[SamplingRequest], decoding: Decoding) -> Iterator[Drawn]:
        """Draw one response per seed of each request, and yield each as it finishes.

        A response depends on its prompt and its seed, not on the other requests."""

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat by this model's chat template, ending where the assistant's turn begins."""
        return encode_prompt(self.tokenizer, messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        # A list of ids is one text; transformers returns a list of texts for a list of lists.
        return cast(str, self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def sample(self, requests: Sequence[SamplingRequest], decoding: Decoding) -> list[list[Response]]:
        """All responses to each request, in the order of its seeds."""
        drawn = {(i, j): response for i, j, response in self.stream(requests, decoding)}
        return [[drawn[i, j] for j in range(len(request.seeds))] for i, request in enumerate(requests)]
