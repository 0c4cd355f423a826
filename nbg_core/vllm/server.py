"""vLLM servers: our own, started for a stage and ended with it, or those whose addresses the profile gives.

vLLM pins its own torch, so it runs in an environment of its own (`make vllm`) and is spoken to over HTTP. A model is
served under its model id, so that no server can answer for other weights by accident. Before the first token, version,
model id and tokenizer are compared (`client.Client.check`).

Our own server stays in the worker's process group, below the supervisor that ends the worker's whole tree
(nbg_core.runtime.supervisor); on Linux it is also killed when the worker is. Its log is a file, whose end is part of every
error about it.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from nbg_core.base.errors import redact
from nbg_core.base.ids import model_id
from nbg_core.base.processes import die_with_parent, is_alive
from nbg_core.config.profile import Profile
from nbg_core.lineage.run import Run
from nbg_core.modeling.loading import context_length, load_tokenizer
from nbg_core.vllm.client import Client, ServerFailed
from nbg_core.vllm.environment import interpreter, missing_environment

GRACE_SECONDS = 10.0
CPU_BATCH_TOKENS = 4096
"""Prompt tokens that a server on a CPU computes at once, or one prompt if it is longer."""
TAIL_LINES = 25
"""Lines of a server's log that an error about it shows."""
_ERROR = re.compile(r"( ERROR .*|^)\b[A-Z]\w*(Error|Exception): ")
_NOISE = re.compile(r"nanobind|^ - (leaked|\.\.\.)|resource_tracker|warnings\.warn")
"""What a server says about its own end, after what ended it."""


@contextmanager
def served(run: Run, path: Path, *, prompt_logprobs: int = 0) -> Iterator[Client]:
    """A client of servers of the model at `path`: the given addresses that serve it, else a server of our own.

    `prompt_logprobs`: entries per position that a scoring client will ask for; 0 is for sampling. Raises ServerFailed
    when no server comes up, or one is of another version, model or tokenizer."""
    settings, model = run.profile.vllm, model_id(path)
    tokenizer = load_tokenizer(path, trust_remote_code=run.profile.models.trust_remote_code)
    if settings.addresses:
        client = Client(settings.addresses, model, settings, run.log)
        client.choose()
        client.check(tokenizer)
        yield client
        return
    logs = run.profile.resolve(run.profile.paths.work) / "logs" / run.run_id
    server = Server(run.profile, path, model, logs, prompt_logprobs)
    try:
        server.wait_until_ready(run.log)
        client = Client((server.address,), model, settings, run.log, died=server.died)
        client.check(tokenizer)
        yield client
    finally:
        server.stop()


class Server:
    """A vLLM server of one model, on a free port of this machine."""

    def __init__(self, profile: Profile, path: Path, model: str, logs: Path, prompt_logprobs: int = 0):
        """Raises FileNotFoundError when vLLM's environment is not there."""
        if problem := missing_environment(profile):
            raise FileNotFoundError(problem)
        self.path, self.timeout = path, profile.vllm.start_timeout_s
        port = _free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.log_path = logs / f"vllm-{model[:8]}-{port}.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [str(interpreter(profile)), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--host=127.0.0.1", f"--port={port}", *_arguments(profile, path, model, prompt_logprobs)]
        with open(self.log_path, "w") as log:
            self._process = subprocess.Popen(
                command, env=_environment(profile), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )  # fmt: skip
        self._tree = [psutil.Process(self._process.pid)]

    def wait_until_ready(self, say: Callable[[str], None]) -> None:
        """Raises ServerFailed when it dies, or does not answer within vllm.start_timeout_s."""
        start = said = time.monotonic()
        say(f"vLLM: starting a server of {self.path} at {self.address}, log {self.log_path}")
        while not self._answers():
            now = time.monotonic()
            if died := self.died():
                raise ServerFailed(died)
            if now - start > self.timeout:
                raise ServerFailed(
                    f"the vLLM server of {self.path} did not answer within {self.timeout:.0f} s; raise "
                    f"vllm.start_timeout_s, or see its log{self._end_of_log()}"
                )
            if now - said > 10:
                said = now
                say(f"vLLM: {now - start:.0f} s, still starting: {(self._tail() or [''])[-1][:150]}")
            time.sleep(0.2)
        self._remember_tree()
        say(f"vLLM: ready after {time.monotonic() - start:.0f} s")

    def died(self) -> str | None:
        """What happened, with the end of the log, if it is not running any more."""
        code = self._process.poll()
        if code is None:
            return None
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the vLLM server of {self.path} ended with {how}{self._end_of_log()}"

    def stop(self) -> None:
        """End it with all its processes, also those that a killed server left behind."""
        self._remember_tree()
        if self._process.poll() is None:
            self._process.terminate()
        for process in self._left_after(GRACE_SECONDS):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self._process.wait()
        self._left_after(GRACE_SECONDS)

    def _left_after(self, seconds: float) -> list[psutil.Process]:
        """Processes of it that have not ended by themselves in that time; what only waits to be collected has."""
        deadline = time.monotonic() + seconds
        while True:
            self._process.poll()
            left = [p for p in self._tree if is_alive(p)]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.05)

    def _remember_tree(self) -> None:
        try:
            now = self._tree[0].children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self._tree += [p for p in now if p not in self._tree]

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def _tail(self) -> list[str]:
        return self._lines()[-TAIL_LINES:]

    def _lines(self) -> list[str]:
        lines = redact(self.log_path.read_text(errors="replace")).splitlines()
        return [line for line in lines if not _NOISE.search(line)]

    def _end_of_log(self) -> str:
        errors = [line for line in self._lines() if _ERROR.search(line)]
        first = f"; the first error in its log: {errors[0].strip()}" if errors else ""
        return f"{first}\n\nend of {self.log_path}:\n" + "\n".join(self._tail())


def _arguments(profile: Profile, path: Path, model: str, prompt_logprobs: int) -> list[str]:
    import torch

    length = profile.vllm.max_model_len or context_length(path)
    arguments = [
        f"--model={path}", f"--served-model-name={model}", f"--dtype={profile.models.dtype}",
        "--generation-config=vllm",  # a model's own sampling defaults would change the draw unseen
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if profile.models.trust_remote_code:
        arguments.append("--trust-remote-code")
    if prompt_logprobs:
        # Log-probs of cached prompt tokens were stale in some versions (vllm PR 42245), and are recomputed in others:
        # a cache could only do harm.
        arguments += [f"--max-logprobs={prompt_logprobs}", "--no-enable-prefix-caching"]
        length = length and length + 1  # it insists on making a token; no position past the model's is computed
    if length:
        arguments.append(f"--max-model-len={length}")
    if not torch.cuda.is_available():
        # A prompt computed in parts makes 0.32 wind back a seed's generator, which a CPU's cannot, and the server dies.
        arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
        arguments += [f"--max-num-batched-tokens={max(length or 0, CPU_BATCH_TOKENS)}"]
    return [*arguments, *profile.vllm.args]


def _environment(profile: Profile) -> dict[str, str]:
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}  # of this environment, not of vLLM's
    defaults = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if profile.threads:
        defaults["OMP_NUM_THREADS"] = str(profile.threads)
    return defaults | {k: v for k, v in os.environ.items() if k not in ours} | {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
