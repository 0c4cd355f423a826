"""Talking to vLLM servers of one model: many requests at once, each answered right, or not at all.

Requests go to the servers in turn, `vllm.max_in_flight` at a time. What may pass is tried again with growing pauses, at
the next server: an answer of 5xx, a broken connection, a timeout, and an answer that is not what was asked for (NaN,
too few tokens; the caller's `parse` says so by raising BadAnswer). What does not pass ends it all, after what had
finished by then was handed back. A key for servers that want one is read from VLLM_API_KEY.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_base, wait_random_exponential
from transformers import PreTrainedTokenizerBase

from nbg_core.config import VllmSettings

T = TypeVar("T")
ATTEMPTS = 5
PAUSE: wait_base = wait_random_exponential(multiplier=1, max=30)
"""Before the next attempt, seconds."""
PROBES = (
    "Hello, world!",
    "  two  spaces\n\ttab",
    "déjà vu — 東京 🙂",
    "1234567890 + 0.5 = x²",
    "def f(x):\n    return x",
)


class ServerFailed(RuntimeError):
    """A vLLM server that cannot do what is asked of it; the message says which, why, and what to do."""


class BadAnswer(ValueError):
    """An answer that is not what was asked for."""


class _Unavailable(Exception):
    """No answer this time."""


class Client:
    def __init__(
        self,
        addresses: Iterable[str],
        model: str,
        settings: VllmSettings,
        log: Callable[[str], None],
        died: Callable[[], str | None] = lambda: None,
    ):
        """`died` says what happened to a server of ours that is not running any more."""
        self.addresses, self.model, self.settings = [a.rstrip("/") for a in addresses], model, settings
        self._log, self._died, self._said = log, died, 0.0
        key = os.environ.get("VLLM_API_KEY")
        self._http: dict[str, Any] = {"headers": {"Authorization": f"Bearer {key}"} if key else {}}
        self._http["trust_env"] = not all(re.match(r"http://(127\.|localhost\b)", a) for a in self.addresses)  # proxies

    def choose(self) -> None:
        """Keep the addresses that serve the model. Raises ServerFailed when there is none, or one does not answer."""
        found = {address: self._models(address) for address in self.addresses}
        self.addresses = [address for address, models in found.items() if self.model in models]
        if not self.addresses:
            what = "; ".join(f"{a} serves {', '.join(m) or 'nothing'}" for a, m in found.items())
            raise ServerFailed(
                f"no server of vllm.addresses serves the model {self.model}: {what}; start one with "
                f"`vllm serve FOLDER --served-model-name {self.model}`"
            )
        self._log(f"vLLM: {self.model} is served at {', '.join(self.addresses)}")

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Before the first token: version, model id and tokenizer of every server, and whose log-probs it gives.

        Raises ServerFailed naming the difference."""
        for address in self.addresses:
            version = str(self._get(address, "/version").get("version")).split("+")[0]
            if version != self.settings.version:
                raise ServerFailed(
                    f"{address} is vLLM {version}, the profile says vllm.version {self.settings.version}, which is "
                    "part of the ids of what it makes; set it to the server's, or serve with that version"
                )
            if self.model not in (models := self._models(address)):
                raise ServerFailed(
                    f"{address} serves {', '.join(models) or 'nothing'}, not the model {self.model}; start it with "
                    f"`--served-model-name {self.model}`"
                )
            self._check_tokenizer(address, tokenizer)
            self._check_logprobs(address, tokenizer)

    def complete(self, bodies: Iterable[dict], parse: Callable[[int, dict], T]) -> Iterator[tuple[int, T]]:
        """For each body of a completion request, as answers come: its number, and `parse` of it and its one choice.

        Raises ServerFailed once a request fails for good; all that was answered before is handed back first."""
        with asyncio.Runner() as runner:
            answers = self._answers(bodies, parse)
            try:
                while (answer := runner.run(_next(answers))) is not None:
                    yield answer
            finally:
                runner.run(_close(answers))

    async def _answers(self, bodies: Iterable[dict], parse: Callable[[int, dict], T]) -> AsyncIterator[tuple[int, T]]:
        n, timeout = self.settings.max_in_flight, httpx.Timeout(self.settings.timeout_s, connect=10, pool=None)
        limits = httpx.Limits(max_connections=n, max_keepalive_connections=n)
        todo, flying = enumerate(bodies), set()
        async with httpx.AsyncClient(timeout=timeout, limits=limits, **self._http) as http:
            try:
                while True:
                    for number, body in itertools.islice(todo, n - len(flying)):
                        flying.add(asyncio.create_task(self._answer(http, number, body, parse)))
                    if not flying:
                        return
                    done, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if task.exception() is None:
                            yield task.result()
                    for task in done:
                        task.result()  # raises what went wrong
            finally:
                for task in flying:
                    task.cancel()
                await asyncio.gather(*flying, return_exceptions=True)

    async def _answer(self, http: httpx.AsyncClient, number: int, body: dict, parse: Callable) -> tuple[int, Any]:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(ATTEMPTS), wait=PAUSE, retry=retry_if_exception_type((_Unavailable, BadAnswer)),
            before_sleep=self._say_retry, reraise=True,
        )  # fmt: skip
        address = ""
        try:
            async for attempt in retrying:
                with attempt:
                    turn = number + attempt.retry_state.attempt_number - 1
                    address = self.addresses[turn % len(self.addresses)]
                    return number, parse(number, await self._choice(http, address, body))
        except (_Unavailable, BadAnswer) as e:
            if died := self._died():
                raise ServerFailed(died) from e
            raise ServerFailed(
                f"no usable answer from {address} in {ATTEMPTS} attempts; the last: {e}; look at the server's log"
            ) from e
        raise AssertionError("an attempt returns or raises")

    async def _choice(self, http: httpx.AsyncClient, address: str, body: dict) -> dict:
        """The one choice of an answer."""
        if died := self._died():
            raise ServerFailed(died)
        try:
            response = await http.post(f"{address}/v1/completions", json={"model": self.model, **body})
        except httpx.TimeoutException as e:
            raise _Unavailable(f"nothing within {self.settings.timeout_s:g} s (vllm.timeout_s)") from e
        except httpx.TransportError as e:
            raise _Unavailable(f"{type(e).__name__} {e}".strip()) from e
        if response.status_code >= 500 or response.status_code == 429:
            raise _Unavailable(f"status {response.status_code}: {response.text[:300]}")
        if response.status_code != 200:
            raise ServerFailed(f"{address} refuses a request with status {response.status_code}: {response.text[:500]}")
        try:
            answer = response.json()
            choices, model = answer["choices"], answer["model"]
        except (ValueError, KeyError, TypeError) as e:
            raise BadAnswer(f"not the answer to a completion request: {response.text[:200]!r}") from e
        if model != self.model:
            raise ServerFailed(f"{address} answered as the model {model}, not {self.model}; serve the one model there")
        if len(choices) != 1:
            raise BadAnswer(f"{len(choices)} choices for one request")
        return choices[0]

    def _say_retry(self, state: RetryCallState) -> None:
        now = time.monotonic()
        if now - self._said >= 1:  # a server that restarts fails all requests in flight
            self._said = now
            self._log(f"vLLM: attempt {state.attempt_number} of {ATTEMPTS} failed: {state.outcome.exception()}")

    def _models(self, address: str) -> list[str]:
        return [m["id"] for m in self._get(address, "/v1/models").get("data", [])]

    def _check_tokenizer(self, address: str, tokenizer: PreTrainedTokenizerBase) -> None:
        for text in (*PROBES, " ".join(tokenizer.all_special_tokens), "".join(tokenizer.all_special_tokens)):
            here = tokenizer(text, add_special_tokens=False)["input_ids"]
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            there = self._post(address, "/tokenize", body).get("tokens")
            if here != there:
                raise ServerFailed(
                    f"{address} has another tokenizer than the model {self.model}: {text!r} is {there} there and "
                    f"{here} here; serve the model's own folder, without --tokenizer"
                )

    def _check_logprobs(self, address: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Log-probs must be the model's own whatever the temperature (vLLM's logprobs_mode raw_logprobs)."""
        prompt = tokenizer(PROBES[0], add_special_tokens=False)["input_ids"]
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "logprobs": 1, "seed": 0}
        best = []
        for temperature in (1.0, 0.2):
            choice = self._post(address, "/v1/completions", {**body, "temperature": temperature})["choices"][0]
            best.append(max(choice["logprobs"]["top_logprobs"][0].values()))
        if abs(best[0] - best[1]) > 0.05:
            raise ServerFailed(
                f"{address} gives log-probs that change with the temperature ({best[0]:.3f} at 1, {best[1]:.3f} at "
                "0.2); serve with --logprobs-mode raw_logprobs"
            )

    def _get(self, address: str, path: str) -> dict:
        return self._talk(address, path, None)

    def _post(self, address: str, path: str, body: dict) -> dict:
        return self._talk(address, path, body)

    def _talk(self, address: str, path: str, body: dict | None) -> dict:
        try:
            with httpx.Client(timeout=httpx.Timeout(self.settings.timeout_s, connect=10), **self._http) as http:
                response = http.get(address + path) if body is None else http.post(address + path, json=body)
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPError, ValueError) as e:
            if died := self._died():
                raise ServerFailed(died) from e
            raise ServerFailed(
                f"{address}{path} does not answer as a vLLM server does: {e}; check vllm.addresses and the server's log"
            ) from e


async def _next(answers: AsyncIterator[T]) -> T | None:
    return await anext(answers, None)


async def _close(answers: Any) -> None:
    await answers.aclose()
