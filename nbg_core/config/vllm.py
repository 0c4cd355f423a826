"""Settings of vLLM servers: section `vllm` of a profile.

A server is either started by a stage, or already runs at an address that the profile names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from nbg_core.base.section import Section


class VllmSettings(Section):
    python: Path = Path(".venv-vllm/bin/python")
    """Interpreter of the environment that vLLM is installed in (`make vllm` builds it)."""
    version: str = "0.32.0"
    """vLLM version that the servers must have. Rows made with another version are not reused."""
    addresses: tuple[str, ...] = ()
    """Base URLs of servers that already run, like http://host:8000; each serves one of the models under its model id.
    Empty: each stage that needs a server starts one and stops it at its end."""
    args: tuple[str, ...] = ()
    """More arguments for the server that a stage starts, like --tensor-parallel-size=8 or
    --gpu-memory-utilization=0.85. After a change of an argument that may change a model's answers (--quantization=fp8,
    say), rows made before are not reused."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Maximum sequence length of a started server, in tokens; null is the model's own limit."""
    max_in_flight: Annotated[int, Field(ge=1)] = 64
    """Maximum number of unanswered requests at a time, over all servers; a killed server loses at most this many."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds until an unanswered request is sent again."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Seconds that a started server may take until it answers."""

    @model_validator(mode="after")
    def _addresses_are_urls(self):
        for address in self.addresses:
            if not re.fullmatch(r"https?://[^\s/]+(/[^\s?#]*)?", address):
                raise ValueError(f"addresses: {address!r} is not a base URL; write it like http://host:8000")
        return self

    @field_validator("args")
    @classmethod
    def _args_are_whole(cls, args: tuple[str, ...]):
        for arg in args:
            if not arg.startswith("--") or " " in arg.partition("=")[0]:
                raise ValueError(f"{arg!r} is not an argument; write each as --NAME or --NAME=VALUE")
            if _name(arg) in ("--host", "--port", "--model", "--served-model-name", "--load-format"):
                raise ValueError(f"{arg!r} is not yours to set: a stage chooses its server's model and address")
            if _name(arg) == "--api-key":
                raise ValueError(f"{_name(arg)} would be stored and logged with the profile: set VLLM_API_KEY instead")
            if _name(arg) == "--max-model-len":
                raise ValueError(f"{arg!r} is a setting of its own: vllm.max_model_len")
        return args

    def identity_args(self) -> list[str]:
        """Those of `args` that may change a model's answers, sorted; none with `addresses`: no server is started."""
        if self.addresses:
            return []
        return sorted(a for a in self.args if _name(a) not in _HOW_A_SERVER_RUNS)


def _name(arg: str) -> str:
    return arg.partition("=")[0].replace("_", "-")


# Arguments that change how a server runs, and not what a model answers.
_HOW_A_SERVER_RUNS = {
    "--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size", "--enable-expert-parallel",
    "--distributed-executor-backend", "--gpu-memory-utilization", "--kv-cache-memory-bytes", "--cpu-offload-gb",
    "--swap-space", "--block-size", "--max-num-seqs", "--max-num-batched-tokens",
    "--max-parallel-loading-workers", "--enforce-eager", "--uvicorn-log-level", "--disable-log-stats",
}  # fmt: skip
