"""A stand-in for a vLLM server: the HTTP that the client speaks, answers made of the seed, and faults on demand.

Its tokenizer is the byte tokenizer of conftest. `FakeVllm.fault(body, attempt)` names what goes wrong with a request
(a key of FAULTS, "400", "429", "500", "hang", "die", ...) or is None; `asked` counts attempts by (prompt, seed).
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import byte_tokenizer

END, VOCABULARY = 256, 260


def response_of(seed: int) -> list[int]:
    """The tokens that a seed gives."""
    return [65 + seed % 26] * (seed % 5 + 1) + [END]


def _without_first(choice: dict) -> None:
    choice["token_ids"] = choice["token_ids"][:1]
    choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:1]


def _cut(choice: dict) -> None:
    """Without its end token, and as if it had reached the longest length."""
    choice["token_ids"].pop()
    choice["logprobs"]["token_logprobs"].pop()
    choice["finish_reason"] = "length"


def _set(key: str, value: object) -> Callable[[dict], None]:
    return lambda choice: choice.update({key: value})


def _logprobs(value: float) -> Callable[[dict], None]:
    return lambda choice: choice["logprobs"].update(token_logprobs=[value] * len(choice["token_ids"]))


FAULTS: dict[str, Callable[[dict], None]] = {
    "nan": _logprobs(math.nan),
    "above 0": _logprobs(0.5),
    "too few tokens": _without_first,
    "no tokens": _set("token_ids", []),
    "too few log-probs": lambda choice: choice["logprobs"]["token_logprobs"].pop(),
    "unknown token": lambda choice: choice["token_ids"].__setitem__(0, VOCABULARY),
    "another prompt": _set("prompt_token_ids", [1]),
    "cut": _cut,
    "aborted": _set("finish_reason", "abort"),
    "no log-probs": _set("logprobs", None),
}


class FakeVllm:
    def __init__(self, model: str, *, version: str = "0.32.0", shift: int = 0, raw: bool = True):
        """`shift` is added to every id of the tokenizer; not `raw`: log-probs change with the temperature."""
        self.model, self.version, self.shift, self.raw = model, version, shift, raw
        self.tokenizer = byte_tokenizer()
        self.fault: Callable[[dict, int], str | None] = lambda body, attempt: None
        self.asked: Counter = Counter()
        self.keys: set[str | None] = set()
        self.flying = self.most_flying = 0
        self.delay = 0.0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.dead = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def stop(self) -> None:
        if not self.dead:
            self.dead = True
            threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def begin(self, body: dict) -> str | None:
        key = (tuple(body["prompt"]), body.get("seed"))
        with self._lock:
            self.asked[key] += 1
            self.flying += 1
            self.most_flying = max(self.most_flying, self.flying)
            attempt = self.asked[key]
        time.sleep(self.delay)
        return self.fault(body, attempt)

    def end(self) -> None:
        with self._lock:
            self.flying -= 1

    def complete(self, body: dict) -> dict:
        ids = response_of(body["seed"])[: body["max_tokens"]]
        logprob = -0.25 if self.raw else -0.25 / body["temperature"]
        return {
            "index": 0, "text": "", "finish_reason": "stop" if ids[-1] == END else "length", "token_ids": ids,
            "prompt_token_ids": body["prompt"], "prompt_logprobs": None,
            "logprobs": {"token_logprobs": [logprob] * len(ids), "top_logprobs": [{"x": logprob}] * len(ids)},
        }  # fmt: skip


def _handler(fake: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def send(self, content: dict, status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/version":
                self.send({"version": fake.version})
            else:
                self.send({"data": [{"id": fake.model}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                ids = fake.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                self.send({"tokens": [i + fake.shift for i in ids]})
                return
            if "return_token_ids" not in body:  # the client's question about whose log-probs these are
                self.send({"model": fake.model, "choices": [fake.complete(body)]})
                return
            fake.keys.add(self.headers["Authorization"])
            fault = fake.begin(body)
            try:
                self.answer(body, fault)
            finally:
                fake.end()

        def answer(self, body: dict, fault: str | None) -> None:
            if fake.dead or fault == "die":
                fake.stop()
                self.close_connection = True  # without an answer
            elif fault == "hang":
                time.sleep(3)
                self.close_connection = True
            elif fault == "no choice":
                self.send({"model": fake.model, "choices": []})
            elif fault == "400":
                self.send({"error": {"message": "max_tokens is too large"}}, 400)
            elif fault in ("429", "500"):
                self.send({"error": {"message": "EngineCore encountered an issue"}}, int(fault))
            elif fault == "no JSON":
                self.send_response(200)
                self.send_header("Content-Length", "5")
                self.end_headers()
                self.wfile.write(b"<html")
            elif fault == "another model":
                self.send({"model": "other", "choices": [fake.complete(body)]})
            else:
                choice = fake.complete(body)
                if fault:
                    FAULTS[fault](choice)
                self.send({"model": fake.model, "choices": [choice]})

    return Handler
