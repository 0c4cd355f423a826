"""Which sampler draws responses: that of `sampling.backend` in the profile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbg_core.base.names import unknown
from nbg_core.config.profile import ENGINES
from nbg_core.lineage.run import Run
from nbg_core.sampling.sampler import Sampler


@contextmanager
def open_sampler(run: Run, path: Path, batch_size: int) -> Iterator[Sampler]:
    """The sampler of `sampling.backend` for the model at `path`.

    Backend `transformers` draws `batch_size` responses at a time; vLLM schedules requests itself. Raises ValueError for
    an unknown backend."""
    profile = run.profile
    match profile.sampling.backend:
        case "vllm":
            from nbg_core.sampling.vllm_sampler import VllmSampler
            from nbg_core.vllm.server import served

            with served(run, path) as client:
                yield VllmSampler(client, path, trust_remote_code=profile.models.trust_remote_code)
        case "transformers":
            from nbg_core.sampling.transformers_sampler import TransformersSampler

            yield TransformersSampler(profile, path, batch_size)
        case backend:
            raise unknown("sampling.backend", backend, ENGINES)
