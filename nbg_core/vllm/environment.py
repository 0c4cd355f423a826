"""Where vLLM is installed, and whether the profile needs it. Imports nothing heavy: Dagster asks too."""

from __future__ import annotations

from pathlib import Path

from nbg_core.config.profile import Profile


def interpreter(profile: Profile) -> Path:
    """Not resolved: the interpreter of a virtual environment is a link, and the link's place is what makes it one."""
    return profile.root / profile.vllm.python


def missing_environment(profile: Profile) -> str | None:
    """What stands in the way of starting the servers that the profile needs, with the remedy, or None."""
    keys = {"sampling.backend": profile.sampling.backend, "teacher.engine": profile.teacher.engine}
    needs = [key for key, value in keys.items() if value == "vllm"]
    if not needs or profile.vllm.addresses or interpreter(profile).is_file():
        return None
    return (
        f"{' and '.join(needs)} 'vllm' need an environment with vLLM, and vllm.python {interpreter(profile)} is not "
        "there; run `make vllm`, or give the addresses of running servers in vllm.addresses"
    )
