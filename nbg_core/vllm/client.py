"""Talking to vLLM servers of one model: many requests at once, each answered right, or not at all.

Requests go to the servers in turn, `vllm.max_in_flight` at a time. What may pass is tried again with growing pauses, at
the next server: an answer of 5xx, a broken connection, a timeout (for PATIENCE_SECONDS: a server that was restarted is
back by then), and an answer that is not what was asked for (NaN, too few tokens; the caller's `parse` says so by an
error; ATTEMPTS times). A server that failed gets nothing for a while if there are others. What does not pass ends it
all, after what had finished by then was handed back. A key for servers that want one is read from VLLM_API_KEY.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type
from tenacity.wait import wait_base, wait_random_exponential
from transformers import PreTrainedTokenizerBase

from nbg_core.config.vllm import VllmSettings

T = TypeVar("T")
ATTEMPTS, ATTEMPTS_UNANSWERED = 5, 3
"""At a request that is answered wrong; that is not answered, at least."""
PATIENCE_SECONDS = 300.0
"""For which a request that is not answered is tried again."""
PAUSE: wait_base = wait_random_exponential(multiplier=1, max=30)
"""Before the next attempt, seconds."""
REST_SECONDS = 60.0
"""For which a server that failed is left alone, if another one is not."""
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


class _Wrong(Exception):
    """Answered wrong too often."""


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
        self._rested: dict[str, float] = {}  # until when, of servers that failed
        key = os.environ.get("VLLM_API_KEY")
        self._http: dict[str, Any] = {"headers": {"Authorization": f"Bearer {key}"} if key else {}}
        self._http["trust_env"] = not all(re.match(r"http://(127\.|localhost\b)", a) for a in self.addresses)  # proxies

    def choose(self) -> None:
        """Keep the addresses that serve the model. Raises ServerFailed when none does."""
        good, why = [], []
        for address in self.addresses:
            try:
                models = self._models(address)
            except ServerFailed as e:
                why.append(str(e))
                self._log(f"vLLM: left out: {e}")
                continue
            good += [address] if self.model in models else []
            why.append(f"{address} serves {', '.join(models) or 'nothing'}")
        if not good:
            raise ServerFailed(
                f"no server of vllm.addresses serves the model {self.model}: {'; '.join(why)}; start one with "
                f"`vllm serve FOLDER --served-model-name {self.model}`"
            )
        self.addresses = good
        self._log(f"vLLM: {self.model} is served at {', '.join(good)}")

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Before the first token: version, model id and tokenizer of every server, and whose log-probs it gives.

        Raises ServerFailed naming the difference."""
        for address in self.addresses:
            version = str(self._talk(address, "/version").get("version")).split("+")[0]
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

    def complete(
        self, bodies: Iterable[dict], parse: Callable[[int, dict], T], *, cached: bool = True
    ) -> Iterator[tuple[int, T]]:
        """For each body of a completion request, as answers come: its number, and `parse` of it and its one choice.

        `parse` raises BadAnswer, KeyError, TypeError or ValueError for what cannot be an answer. Not `cached`: no
        attempt finds anything in a server's prefix cache. Raises ServerFailed once a request fails for good; all that
        was answered before is handed back first."""
        with asyncio.Runner() as runner:
            answers = self._answers(bodies, parse, cached)
            while (answer := runner.run(_next(answers))) is not None:
                yield answer

    async def _answers(
        self, bodies: Iterable[dict], parse: Callable[[int, dict], T], cached: bool
    ) -> AsyncIterator[tuple[int, T]]:
        n, timeout = self.settings.max_in_flight, httpx.Timeout(self.settings.timeout_s, connect=10, pool=None)
        limits = httpx.Limits(max_connections=n, max_keepalive_connections=n)
        todo = enumerate(bodies)
        flying: set[asyncio.Task[tuple[int, T]]] = set()
        async with httpx.AsyncClient(timeout=timeout, limits=limits, **self._http) as http:
            try:
                while True:
                    for number, body in itertools.islice(todo, n - len(flying)):
                        flying.add(asyncio.create_task(self._answer(http, number, body, parse, cached)))
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

    async def _answer(
        self, http: httpx.AsyncClient, number: int, body: dict, parse: Callable, cached: bool
    ) -> tuple[int, Any]:
        retrying = AsyncRetrying(
            stop=_is_enough, wait=PAUSE, retry=retry_if_exception_type((_Unavailable, BadAnswer)),
            before_sleep=self._say_retry, reraise=True,
        )  # fmt: skip
        address, tried, wrong = "", 0, 0
        try:
            async for attempt in retrying:
                with attempt:
                    address, tried = self._next_address(number + tried), tried + 1
                    salt = {} if cached else {"cache_salt": uuid.uuid4().hex}
                    choice = None
                    try:
                        choice = await self._choice(http, address, body | salt)
                        return number, parse(number, choice)
                    except (KeyError, TypeError, ValueError) as e:
                        text = str(e) if isinstance(e, BadAnswer) else f"{type(e).__name__} {e} in {str(choice)[:200]}"
                        wrong += 1
                        raise (BadAnswer if wrong < ATTEMPTS else _Wrong)(text) from e
        except (_Unavailable, BadAnswer, _Wrong) as e:
            if died := self._died():
                raise ServerFailed(died) from e
            raise ServerFailed(
                f"no usable answer from {address} in {tried} attempts; the last: {e}; look at the server's log"
            ) from e
        raise AssertionError("an attempt returns or raises")

    def _next_address(self, turn: int) -> str:
        now = time.monotonic()
        ready = [a for a in self.addresses if self._rested.get(a, 0.0) <= now] or self.addresses
        return ready[turn % len(ready)]

    async def _choice(self, http: httpx.AsyncClient, address: str, body: dict) -> dict:
        """The one choice of an answer."""
        try:
            return await self._asked(http, address, body)
        except _Unavailable:
            self._rested[address] = time.monotonic() + REST_SECONDS
            raise

    async def _asked(self, http: httpx.AsyncClient, address: str, body: dict) -> dict:
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
            self._log(f"vLLM: attempt {state.attempt_number} failed, trying again: {_error(state)}")

    def _models(self, address: str) -> list[str]:
        return [m["id"] for m in self._talk(address, "/v1/models").get("data", [])]

    def _check_tokenizer(self, address: str, tokenizer: PreTrainedTokenizerBase) -> None:
        for text in (*PROBES, " ".join(tokenizer.all_special_tokens), "".join(tokenizer.all_special_tokens)):
            here = tokenizer(text, add_special_tokens=False)["input_ids"]
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            there = self._talk(address, "/tokenize", body).get("tokens")
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
            choice = self._talk(address, "/v1/completions", {**body, "temperature": temperature})["choices"][0]
            best.append(max(choice["logprobs"]["top_logprobs"][0].values()))
        if abs(best[0] - best[1]) > 0.05:
            raise ServerFailed(
                f"{address} gives log-probs that change with the temperature ({best[0]:.3f} at 1, {best[1]:.3f} at "
                "0.2); serve with --logprobs-mode raw_logprobs"
            )

    def _talk(self, address: str, path: str, body: dict | None = None) -> dict:
        """GET, or POST of a body, which may have to wait for a model."""
        timeout = min(self.settings.timeout_s, 30.0) if body is None else self.settings.timeout_s
        try:
            with httpx.Client(timeout=httpx.Timeout(timeout, connect=10), **self._http) as http:
                response = http.get(address + path) if body is None else http.post(address + path, json=body)
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPError, ValueError) as e:
            if died := self._died():
                raise ServerFailed(died) from e
            raise ServerFailed(
                f"{address}{path} does not answer as a vLLM server does: {e}; check vllm.addresses and the server's log"
            ) from e


def _error(state: RetryCallState) -> BaseException | None:
    """What the attempt just made has raised."""
    return state.outcome.exception() if state.outcome else None


def _is_enough(state: RetryCallState) -> bool:
    """Whether to give up on a server that does not answer. Wrong answers are counted in `Client._answer`."""
    if not isinstance(_error(state), _Unavailable):
        return False
    return state.attempt_number >= ATTEMPTS_UNANSWERED and (state.seconds_since_start or 0.0) >= PATIENCE_SECONDS


async def _next(answers: AsyncIterator[T]) -> T | None:
    return await anext(answers, None)
