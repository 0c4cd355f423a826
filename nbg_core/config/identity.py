"""Ids of settings: hashes of the settings and versions that decide the content of rows.

An id changes when, and only when, the rows would differ. A setting that only changes how work is done (batch sizes,
processes) is part of no id, so rows made with one number of processes are found again with another.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable

from nbg_core.base.ids import digest, model_id
from nbg_core.base.names import unknown
from nbg_core.config.profile import ENGINES, Profile

CODE_VERSION = "1"
"""Increment it when a stage makes other rows from the same settings and inputs: every partition is then stale, and its
stage runs again. Rows that are found by an id (`samples`, `scores`, `reference_logprobs`, `evaluations`,
`teacher_logits`) are kept all the same. To make those anew, change their id: STORE_VERSION is part of `storage_id`."""

STORE_VERSION = 4
"""Increment it when the same settings give other stored teacher rows than before: teacher rows are then made anew."""


def student_id(profile: Profile) -> str:
    """Model id of the SFT student. Raises FileNotFoundError when its folder holds no model."""
    return model_id(profile.resolve(profile.models.student))


def teacher_id(profile: Profile) -> str:
    """Model id of the teacher. Raises FileNotFoundError when its folder holds no model."""
    return model_id(profile.resolve(profile.models.teacher))


def engine_identity(profile: Profile, engine: str) -> list[str]:
    """The name of a sampling backend or teacher engine, then the versions and arguments that it computes with.

    Raises ValueError for an unknown engine."""
    match engine:
        case "transformers":
            packages = ("torch", "transformers")
            return [engine, *(f"{package} {importlib.metadata.version(package)}" for package in packages)]
        case "vllm":
            return [engine, profile.vllm.version, *profile.vllm.identity_args()]
        case _:
            raise unknown("engine", engine, ENGINES)


def sampling_id(profile: Profile) -> str:
    """Hash of the settings that decide a response, besides query, model and index; the number of responses and the
    batch size are not among them. Column `sampling_id` of `samples`."""
    s = profile.sampling
    engine = engine_identity(profile, s.backend)
    return digest("sampling", profile.models.dtype, engine, s.temperature, s.top_p, s.max_tokens, s.seed)


def storage_id(profile: Profile) -> str:
    """Hash of the settings that decide the stored teacher rows, besides the teacher and the response. Column
    `settings_id` of `teacher_logits`."""
    stored = profile.teacher.model_dump(mode="json", exclude={"batch_tokens", "chunk_samples", "n_processes"})
    engine = engine_identity(profile, profile.teacher.engine)
    return digest("teacher", STORE_VERSION, profile.models.dtype, engine, stored)


def scoring_id(profile: Profile) -> str:
    """Hash of the settings that decide the log-probabilities that a model gives a response, besides the model. Column
    `settings_id` of `reference_logprobs`."""
    return digest("scoring", profile.models.dtype)


def answering_id(profile: Profile) -> str:
    """Hash of the settings that decide a model's answer to a held-out query, besides the model. Column `settings_id` of
    `evaluations`."""
    engine = engine_identity(profile, profile.sampling.backend)
    return digest("evaluation", profile.models.dtype, engine, profile.evaluation.max_tokens)


def settings_id(settings: dict) -> str:
    """Hash of an asset's settings. Column `settings_id` of `lineage.materialisations`."""
    return digest("settings", json.loads(json.dumps(settings, default=str)))


def loglik_engine(profile: Profile) -> list[str] | None:
    """The part of the teacher's engine that `teacher_loglik` depends on: versions and arguments of vLLM; None for
    transformers, whose versions agree up to rounding."""
    engine = engine_identity(profile, profile.teacher.engine)
    return engine if engine[0] == "vllm" else None


IDENTITIES: dict[str, Callable[[Profile], object]] = {
    "teacher": teacher_id,
    "scoring_id": scoring_id,
    "loglik_engine": loglik_engine,
}
"""The models and settings that a scorer can depend on (`Scorer.depends_on`): name -> function that gives the value, or
None where there is nothing to depend on."""
