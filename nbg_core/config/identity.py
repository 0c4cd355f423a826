"""What enters which id: the settings and versions that decide the content of rows, hashed.

An id changes when, and only when, the rows would be other rows. So a setting that only changes how work is done (batch
sizes, processes) is in none of them, and rows made with one number of processes are found again with another.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable

from nbg_core.base.ids import digest, model_id
from nbg_core.base.names import unknown
from nbg_core.config.profile import ENGINES, Profile

CODE_VERSION = "1"
"""Raised when the same settings and inputs would give other rows: everything made before is then stale."""

STORE_VERSION = 4
"""Raised when the same settings give other stored teacher rows."""


def student_id(profile: Profile) -> str:
    """Model id of the SFT student. Raises FileNotFoundError when it is not there."""
    return model_id(profile.resolve(profile.models.student))


def teacher_id(profile: Profile) -> str:
    """Model id of the teacher. Raises FileNotFoundError when it is not there."""
    return model_id(profile.resolve(profile.models.teacher))


def engine_version(profile: Profile, engine: str) -> list[str]:
    """A sampling backend or teacher engine, with the versions of what it computes with.

    Raises ValueError for an unknown one."""
    match engine:
        case "transformers":
            return [engine, *(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers"))]
        case "vllm":
            return [engine, profile.vllm.version, *profile.vllm.identity_args()]
        case _:
            raise unknown("engine", engine, ENGINES)


def sampling_id(profile: Profile) -> str:
    """What changes a response's distribution or draw; the number of responses and the batch size do not."""
    s = profile.sampling
    made_by = engine_version(profile, s.backend)
    return digest("sampling", profile.models.dtype, made_by, s.temperature, s.top_p, s.max_tokens, s.seed)


def storage_id(profile: Profile) -> str:
    """What changes the stored teacher rows, besides the teacher. Column `settings_id` of `teacher_logits`."""
    stored = profile.teacher.model_dump(mode="json", exclude={"batch_tokens", "chunk_samples", "n_processes"})
    return digest(
        "teacher", STORE_VERSION, profile.models.dtype, engine_version(profile, profile.teacher.engine), stored
    )


def scoring_id(profile: Profile) -> str:
    """What changes the log-probabilities that a model gives a response, besides the model. Column `settings_id` of
    `reference_logprobs`."""
    return digest("scoring", profile.models.dtype)


def answering_id(profile: Profile) -> str:
    """What changes a model's answer to a held-out query, besides the model. Column `settings_id` of `evaluations`."""
    made_by = engine_version(profile, profile.sampling.backend)
    return digest("evaluation", profile.models.dtype, made_by, profile.evaluation.max_tokens)


def settings_id(settings: dict) -> str:
    """Hash of an asset's settings. Column `settings_id` of `lineage.materialisations`."""
    return digest("settings", json.loads(json.dumps(settings, default=str)))


IDENTITIES: dict[str, Callable[[Profile], object]] = {
    "teacher": teacher_id,
    "scoring_id": scoring_id,
    "teacher_engine": lambda profile: engine_version(profile, profile.teacher.engine),
}
"""What a scorer can depend on (`Scorer.depends_on`), by name."""
