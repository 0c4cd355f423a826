"""A client of vLLM servers that serve one model: it sends many requests at once and returns only valid answers.

Requests go to the servers in turn, at most `vllm.max_in_flight` at a time. Two kinds of failure are retried, with
growing pauses and at the next server:

- No answer: status 5xx or 429, a broken connection, a timeout. Retried until RETRY_SECONDS have passed, which is long
  enough for a server to be restarted, and at least MIN_ATTEMPTS_UNANSWERED times. A server that did not answer gets no
  request for REST_SECONDS, as long as there are others.
- A wrong answer: NaN, too few tokens. The caller's `parse` detects it and raises. MAX_WRONG_ANSWERS of them are
  allowed per request.

Any other failure, and one that persists after all attempts, ends the call; answers that arrived before it are still
yielded. Servers that require an API key get the one in the environment variable VLLM_API_KEY.
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
MAX_WRONG_ANSWERS = 5
"""Wrong answers to one request after which it fails."""
MIN_ATTEMPTS_UNANSWERED = 3
"""Attempts that a request without an answer gets at least, however long they take."""
RETRY_SECONDS = 300.0
"""How long a request without an answer is retried."""
PAUSE: wait_base = wait_random_exponential(multiplier=1, max=30)
"""Seconds before the next attempt."""
REST_SECONDS = 60.0
"""How long a server that did not answer gets no request, if another server is available."""
PROBES = ("Hello, world!", "  two  spaces\n\ttab", "déjà vu — 東京 🙂", "1234567890 + 0.5 = x²",
          "def f(x):\n    return x")  # fmt: skip
"""Texts whose tokens must be the same here and at a server."""


class ServerFailed(RuntimeError):
    """A vLLM server cannot do what is asked of it. The message names the server, the reason and the remedy."""


class BadAnswer(ValueError):
    """An answer that cannot be right for its request, such as one with too few tokens. The request is retried."""


class _TooManyWrongAnswers(Exception):
    """A request got MAX_WRONG_ANSWERS wrong answers."""


class _Unavailable(Exception):
    """A server did not answer. The request is retried."""


class Client:
    """Sends completion requests to one or more vLLM servers of one model."""

    def __init__(
        self,
        addresses: Iterable[str],
        model: str,
        settings: VllmSettings,
        log: Callable[[str], None],
        died: Callable[[], str | None] = lambda: None,
    ):
        """`model` is the name the servers serve it under. `died` returns how a server that this process started has
        ended, or None while it runs."""
        self.addresses, self.model, self.settings = [a.rstrip("/") for a in addresses], model, settings
        self._log, self._died, self._last_retry_line = log, died, 0.0
        self._resting_until: dict[str, float] = {}  # address -> time.monotonic()
        key = os.environ.get("VLLM_API_KEY")
        self._http: dict[str, Any] = {"headers": {"Authorization": f"Bearer {key}"} if key else {}}
        # The environment may name a proxy, which requests to this machine must not go through.
        self._http["trust_env"] = not all(re.match(r"http://(127\.|localhost\b)", a) for a in self.addresses)

    def choose(self) -> None:
        """Drop the addresses that do not serve the model. Raises ServerFailed when none is left."""
        good, found = [], []
        for address in self.addresses:
            try:
                models = self._models(address)
            except ServerFailed as e:
                found.append(str(e))
                self._log(f"vLLM: left out: {e}")
                continue
            good += [address] if self.model in models else []
            found.append(f"{address} serves {', '.join(models) or 'nothing'}")
        if not good:
            raise ServerFailed(
                f"no server of vllm.addresses serves the model {self.model}: {'; '.join(found)}; start one with "
                f"`vllm serve FOLDER --served-model-name {self.model}`"
            )
        self.addresses = good
        self._log(f"vLLM: {self.model} is served at {', '.join(good)}")

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ServerFailed unless every server has the profile's vLLM version, this model and tokenizer, and
        log-probs that do not depend on the sampling temperature."""
        for address in self.addresses:
            version = str(self._request(address, "/version").get("version")).split("+")[0]
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
        """Send the `bodies` of completion requests; yield (i, parse(i, choice)) for each, in order of arrival.

        i is the position of the body and `choice` the answer's only choice. `parse` raises BadAnswer, KeyError,
        TypeError or ValueError when the answer is wrong. Without `cached` no attempt uses a server's prefix cache.
        Raises ServerFailed once retrying has failed for a request; answers that arrived before are yielded first."""
        with asyncio.Runner() as runner:
            answers = self._answers(bodies, parse, cached)
            while (answer := runner.run(_next(answers))) is not None:
                yield answer

    async def _answers(
        self, bodies: Iterable[dict], parse: Callable[[int, dict], T], cached: bool
    ) -> AsyncIterator[tuple[int, T]]:
        n, timeout = self.settings.max_in_flight, httpx.Timeout(self.settings.timeout_s, connect=10, pool=None)
        limits = httpx.Limits(max_connections=n, max_keepalive_connections=n)
        waiting = enumerate(bodies)
        in_flight: set[asyncio.Task[tuple[int, T]]] = set()
        async with httpx.AsyncClient(timeout=timeout, limits=limits, **self._http) as http:
            try:
                while True:
                    for number, body in itertools.islice(waiting, n - len(in_flight)):
                        in_flight.add(asyncio.create_task(self._answer(http, number, body, parse, cached)))
                    if not in_flight:
                        return
                    done, in_flight = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if task.exception() is None:
                            yield task.result()
                    for task in done:
                        task.result()  # raises the error of a request that failed
            finally:
                for task in in_flight:
                    task.cancel()
                await asyncio.gather(*in_flight, return_exceptions=True)

    async def _answer(
        self, http: httpx.AsyncClient, number: int, body: dict, parse: Callable, cached: bool
    ) -> tuple[int, Any]:
        """`number`, and what `parse` makes of the answer to one request. Retries as the module's docstring says."""
        retrying = AsyncRetrying(
            stop=_has_waited_enough, wait=PAUSE, retry=retry_if_exception_type((_Unavailable, BadAnswer)),
            before_sleep=self._log_retry, reraise=True,
        )  # fmt: skip
        address, n_tried, n_wrong = "", 0, 0
        try:
            async for attempt in retrying:
                with attempt:
                    address, n_tried = self._address(number + n_tried), n_tried + 1
                    salt = {} if cached else {"cache_salt": uuid.uuid4().hex}
                    choice = None
                    try:
                        choice = await self._choice(http, address, body | salt)
                        return number, parse(number, choice)
                    except (KeyError, TypeError, ValueError) as e:
                        text = str(e) if isinstance(e, BadAnswer) else f"{type(e).__name__} {e} in {str(choice)[:200]}"
                        n_wrong += 1
                        raise (BadAnswer if n_wrong < MAX_WRONG_ANSWERS else _TooManyWrongAnswers)(text) from e
        except (_Unavailable, _TooManyWrongAnswers) as e:
            if died := self._died():
                raise ServerFailed(died) from e
            raise ServerFailed(
                f"no usable answer from {address} in {n_tried} attempts; the last: {e}; look at the server's log"
            ) from e
        raise AssertionError("an attempt returns or raises")

    def _address(self, turn: int) -> str:
        """The server whose turn it is, among those that do not rest; among all if all rest."""
        now = time.monotonic()
        ready = [a for a in self.addresses if self._resting_until.get(a, 0.0) <= now] or self.addresses
        return ready[turn % len(ready)]

    async def _choice(self, http: httpx.AsyncClient, address: str, body: dict) -> dict:
        """`_post`, after which a server that did not answer rests."""
        try:
            return await self._post(http, address, body)
        except _Unavailable:
            self._resting_until[address] = time.monotonic() + REST_SECONDS
            raise

    async def _post(self, http: httpx.AsyncClient, address: str, body: dict) -> dict:
        """Send one completion request and return the only choice of its answer.

        Raises _Unavailable and BadAnswer for what may be retried, ServerFailed for what may not."""
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
            raise ServerFailed(
                f"{address} refuses a request with status {response.status_code}: {response.text[:500]} (if it is "
                "about log-probs, start the server with --max-logprobs of at least teacher.k_head)"
            )
        try:
            answer = response.json()
            choices, model = answer["choices"], answer["model"]
        except (ValueError, KeyError, TypeError) as e:
            raise BadAnswer(f"not the answer to a completion request: {response.text[:200]!r}") from e
        if model != self.model:
            raise ServerFailed(f"{address} answered as the model {model}, not {self.model}; serve only that one there")
        if len(choices) != 1:
            raise BadAnswer(f"{len(choices)} choices for one request")
        return choices[0]

    def _log_retry(self, state: RetryCallState) -> None:
        now = time.monotonic()
        if now - self._last_retry_line >= 1:  # a server that restarts fails all requests in flight at once
            self._last_retry_line = now
            self._log(f"vLLM: attempt {state.attempt_number} failed, trying again: {_error(state)}")

    def _models(self, address: str) -> list[str]:
        return [m["id"] for m in self._request(address, "/v1/models").get("data", [])]

    def _check_tokenizer(self, address: str, tokenizer: PreTrainedTokenizerBase) -> None:
        for text in (*PROBES, " ".join(tokenizer.all_special_tokens), "".join(tokenizer.all_special_tokens)):
            here = tokenizer(text, add_special_tokens=False)["input_ids"]
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            there = self._request(address, "/tokenize", body).get("tokens")
            if here != there:
                raise ServerFailed(
                    f"{address} has another tokenizer than the model {self.model}: {text!r} is {there} there and "
                    f"{here} here; serve the model's own folder, without --tokenizer"
                )

    def _check_logprobs(self, address: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ServerFailed unless log-probs are the model's own at any temperature (--logprobs-mode raw_logprobs)."""
        prompt = tokenizer(PROBES[0], add_special_tokens=False)["input_ids"]
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "logprobs": 1, "seed": 0}
        best = []  # log-prob of the most probable token
        for temperature in (1.0, 0.2):
            choice = self._request(address, "/v1/completions", {**body, "temperature": temperature})["choices"][0]
            best.append(max(choice["logprobs"]["top_logprobs"][0].values()))
        if abs(best[0] - best[1]) > 0.05:
            raise ServerFailed(
                f"{address} gives log-probs that change with the temperature ({best[0]:.3f} at 1, {best[1]:.3f} at "
                "0.2); serve with --logprobs-mode raw_logprobs"
            )

    def _request(self, address: str, path: str, body: dict | None = None) -> dict:
        """The answer to a GET, or to a POST of `body`, which waits for the model. Raises ServerFailed without one."""
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
    """What the last attempt raised."""
    return state.outcome.exception() if state.outcome else None


def _has_waited_enough(state: RetryCallState) -> bool:
    """Whether to give up on a request without an answer. `Client._answer` counts the wrong answers."""
    if not isinstance(_error(state), _Unavailable):
        return False
    return state.attempt_number >= MIN_ATTEMPTS_UNANSWERED and (state.seconds_since_start or 0.0) >= RETRY_SECONDS


async def _next(answers: AsyncIterator[T]) -> T | None:
    return await anext(answers, None)
