"""vLLM servers for a stage: either one that is started here and stopped at the end, or those in `vllm.addresses`.

vLLM pins its own torch, so it runs in an environment of its own (`make vllm`) and is reached over HTTP. A model is
served under its model id, so that no server can answer for other weights by accident. Before a server is used, its
version, model id, tokenizer and log-probs are checked (`Client.check`).

A server that is started here belongs to the worker's process tree, which the supervisor ends as a whole
(`runtime.supervisor`). On Linux the kernel also kills it when the worker is killed. It writes its log to a file, and
errors about the server show the end of that file.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from nbg_core.base.errors import redact
from nbg_core.base.ids import model_id
from nbg_core.base.processes import GRACE_SECONDS, die_with_parent, free_port, is_alive
from nbg_core.config.profile import Profile
from nbg_core.lineage.run import Run
from nbg_core.modeling.loading import context_length, load_tokenizer
from nbg_core.vllm.client import Client, ServerFailed
from nbg_core.vllm.environment import interpreter, missing_environment

CPU_BATCH_TOKENS = 4096
"""Tokens per forward pass of a server on a CPU, or the longest sequence that it takes, if that is more."""
TAIL_LINES = 25
"""Lines from the end of a server's log that errors about it show."""
_ERROR = re.compile(r"( ERROR .*|^)\b[A-Z]\w*(Error|Exception): ")
_NOISE = re.compile(r"nanobind|^ - (leaked|\.\.\.)|resource_tracker|warnings\.warn")
"""Lines that a server writes while it shuts down. They come after the error and say nothing about it."""


@contextmanager
def served(run: Run, path: Path, *, prompt_logprobs: int = 0) -> Iterator[Client]:
    """A client for the model at `path`: of the servers in `vllm.addresses` that serve it or, if there are no addresses,
    of a server that is started here and stopped at the end of the `with` block.

    `prompt_logprobs`: most probable tokens per prompt position that requests will ask for; 0 when sampling. Raises
    ServerFailed when a server does not start, or has another version, model or tokenizer than the profile says."""
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
    """A vLLM server process that serves one model on a free port of this machine."""

    def __init__(self, profile: Profile, path: Path, model: str, logs: Path, prompt_logprobs: int = 0):
        """Start it; its log goes into the folder `logs`. Raises FileNotFoundError without an environment for vLLM."""
        if problem := missing_environment(profile):
            raise FileNotFoundError(problem)
        self.path, self.timeout = path, profile.vllm.start_timeout_s
        port = free_port("127.0.0.1")
        self.address = f"http://127.0.0.1:{port}"
        self.log_path = logs / f"vllm-{model[:8]}-{port}.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [str(interpreter(profile)), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--host=127.0.0.1", f"--port={port}", *server_arguments(profile, path, model, prompt_logprobs)]
        with open(self.log_path, "w") as log:
            self._process = subprocess.Popen(
                command, env=server_environment(profile), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, preexec_fn=die_with_parent,
            )  # fmt: skip
        self._tree = [psutil.Process(self._process.pid)]

    def wait_until_ready(self, say: Callable[[str], None]) -> None:
        """Wait until the server answers. Raises ServerFailed when it ends before, or needs longer than
        `vllm.start_timeout_s`."""
        start = last_line = time.monotonic()
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
            if now - last_line > 10:
                last_line = now
                say(f"vLLM: {now - start:.0f} s, still starting: {(self._tail() or [''])[-1][:150]}")
            time.sleep(0.2)
        self._remember_tree()
        say(f"vLLM: ready after {time.monotonic() - start:.0f} s")

    def died(self) -> str | None:
        """How the server has ended, with the end of its log; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the vLLM server of {self.path} ended with {how}{self._end_of_log()}"

    def stop(self) -> None:
        """End the server and all its child processes, including those it left behind when it was killed itself."""
        self._remember_tree()
        if self._process.poll() is None:
            self._process.terminate()
        for process in self._running_after(GRACE_SECONDS):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self._process.wait()
        self._running_after(GRACE_SECONDS)

    def _running_after(self, seconds: float) -> list[psutil.Process]:
        """The processes of the server that still run after `seconds`. Returns at once when there are none."""
        deadline = time.monotonic() + seconds
        while True:
            self._process.poll()
            running = [p for p in self._tree if is_alive(p)]
            if not running or time.monotonic() > deadline:
                return running
            time.sleep(0.05)

    def _remember_tree(self) -> None:
        """Note the server's present child processes, which cannot be found any more once the server has ended."""
        try:
            children = self._tree[0].children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self._tree += [p for p in children if p not in self._tree]

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


def server_arguments(profile: Profile, path: Path, model: str, prompt_logprobs: int) -> list[str]:
    """vLLM's arguments for serving the model at `path` under the name `model`; `prompt_logprobs` as in `served`."""
    import torch

    length = profile.vllm.max_model_len or context_length(path)
    arguments = [
        f"--model={path}", f"--served-model-name={model}", f"--dtype={profile.models.dtype}",
        "--generation-config=vllm",  # the model folder's sampling defaults would silently change what is sampled
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if profile.models.trust_remote_code:
        arguments.append("--trust-remote-code")
    if prompt_logprobs:
        # In some versions the log-probs of cached prompt tokens are stale (vllm PR 42245), in others they are computed
        # again: a prefix cache never helps here.
        arguments += [f"--max-logprobs={prompt_logprobs}", "--no-enable-prefix-caching"]
        # vLLM always generates one token. It does not compute a position for it, so the model's length is not exceeded.
        length = length and length + 1
    if length:
        arguments.append(f"--max-model-len={length}")
    if not torch.cuda.is_available():
        # With chunked prefill, vLLM 0.32 rewinds the random generator of a seeded request. A CPU generator cannot be
        # rewound, and the server crashes.
        arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
        arguments += [f"--max-num-batched-tokens={max(length or 0, CPU_BATCH_TOKENS)}"]
    return [*arguments, *profile.vllm.args]


def server_environment(profile: Profile) -> dict[str, str]:
    """The environment of a server process: this process's variables, defaults for a few, and fixed values for some."""
    not_passed_on = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}  # they name this environment, not vLLM's
    defaults = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if profile.threads:
        defaults["OMP_NUM_THREADS"] = str(profile.threads)
    return defaults | {k: v for k, v in os.environ.items() if k not in not_passed_on} | {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    }  # fmt: skip
