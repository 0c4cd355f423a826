"""Where vLLM is installed, and whether the profile needs it. Light imports only: Dagster's process imports this."""

from __future__ import annotations

from pathlib import Path

from nbg_core.config.profile import Profile


def interpreter(profile: Profile) -> Path:
    """The Python interpreter of vLLM's environment."""
    # Links are not resolved: a virtual environment's interpreter is a link, and Python finds the environment by where
    # the link lies.
    return profile.root / profile.vllm.python


def missing_environment(profile: Profile) -> str | None:
    """Why the servers that the profile needs cannot be started, with the remedy; None when they can."""
    users = {"sampling.backend": profile.sampling.backend, "teacher.engine": profile.teacher.engine}
    needed_by = [key for key, value in users.items() if value == "vllm"]
    if not needed_by or profile.vllm.addresses or interpreter(profile).is_file():
        return None
    return (
        f"{' and '.join(needed_by)} 'vllm' need an environment with vLLM, and vllm.python {interpreter(profile)} is "
        "not there; run `make vllm`, or give the addresses of running servers in vllm.addresses"
    )
