"""The registry of assets: ASSETS lists them in an order in which they can be materialised.

Everything that needs to know the assets reads it: the worker, lineage and staleness, `nbg run` and `nbg tables`, the
checks, the Dagster definitions and the tests. This module imports neither torch nor Dagster nor a stage.

An asset's `settings` are those that decide its content. They are stored with every materialisation, and a change in any
of them makes the asset stale. A setting that only changes how the work is done is not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nbg_core.base.ids import query_file_id
from nbg_core.base.names import find
from nbg_core.config import identity
from nbg_core.config.profile import Profile
from nbg_core.config.slices import check_slice_name, query_file
from nbg_core.losses import metrics
from nbg_core.scorers.scorers import SCORERS, Scorer


@dataclass(frozen=True)
class Asset:
    """A node of the asset graph."""

    name: str
    """Name in Dagster, in the lake's lineage and on the command line."""
    description: str
    """What it holds, for Dagster's catalog."""
    stage: str
    """Module whose `materialise(run, slice_name)` makes it and returns a Report; it runs in a worker process."""
    tables: tuple[str, ...]
    """Lake tables that it writes; the first one holds its rows."""
    settings: Callable[[Profile, str, Any], dict]
    """(profile, model id of the current policy, slice name or None) -> the settings that decide its content.

    Raises FileNotFoundError for a missing query file or model folder."""
    upstream: tuple[str, ...] = ()
    """Names of the assets that it reads."""
    partitioned: bool = True
    """Whether it has a partition per slice. An asset without partitions reads all slices of its upstream."""
    checks: tuple[str, ...] = ()
    """Names in `checks.checks.CHECKS`, in the order in which they run."""
    plots: tuple[str, ...] = ()
    """Names in `nbg_assets.plots.PLOTS`."""
    group: str = "data"
    """Group in Dagster's catalog."""
    kinds: frozenset[str] = field(default_factory=frozenset)
    """Kinds in Dagster's catalog: the tools that it is made with."""
    loads_model: bool = True
    """Whether its stage may load a model. Such stages run one after the other (Dagster pool `model`)."""


def _merge(section: dict, **more: object) -> dict:
    """`section` and `more` as one dict. Raises ValueError for a name that both have: one value would hide the other."""
    if both := section.keys() & more.keys():
        raise ValueError(f"two settings of an asset have the name {', '.join(sorted(both))}; give one another name")
    return section | more


def _queries(profile: Profile, policy_id: str, slice_name: str) -> dict:
    # A prompt must fit the student's context together with the longest response: this decides what is dropped.
    longest = max(profile.sampling.max_tokens, profile.evaluation.max_tokens)
    file_id = query_file_id(query_file(profile, slice_name))
    student_id = identity.student_id(profile)
    return _merge(profile.queries.model_dump(), file=file_id, max_tokens=longest, student=student_id)


def _student_samples(profile: Profile, policy_id: str, slice_name: str) -> dict:
    sampling = profile.sampling
    teacher_id = identity.teacher_id(profile) if sampling.n_teacher else None
    return {"sampling_id": identity.sampling_id(profile), "n_student": sampling.n_student,
            "n_teacher": sampling.n_teacher, "student": policy_id, "teacher": teacher_id}  # fmt: skip


def _versions(scorers: Iterable[Scorer]) -> dict:
    """The versions of scorers that have been raised. Version 1 is left out: lakes of earlier versions stay fresh."""
    return {f"version of {scorer.name}": scorer.version for scorer in scorers if scorer.version != "1"}


def _filtered_pairs(profile: Profile, policy_id: str, slice_name: str) -> dict:
    scorers = [find(SCORERS, name, "scorer") for name, weight in profile.preference.weights.items() if weight]
    needed = [name for scorer in scorers for name in scorer.depends_on]
    values = {name: find(identity.IDENTITIES, name, "identity")(profile) for name in needed}
    # "teacher" is None, not left out, if no scorer depends on it: so lakes of earlier versions stay fresh.
    values = {"teacher": None} | {name: value for name, value in values.items() if value is not None}
    return _merge(profile.preference.model_dump(), **values, **_versions(scorers))


def _teacher_logits(profile: Profile, policy_id: str, slice_name: str) -> dict:
    return {"storage_id": identity.storage_id(profile), "teacher": identity.teacher_id(profile)}


def _reference_logprobs(profile: Profile, policy_id: str, slice_name: str) -> dict:
    return {"reference": policy_id, "scoring_id": identity.scoring_id(profile)}


def _student_checkpoint(profile: Profile, policy_id: str, slice_name: None) -> dict:
    teacher_id, storage_id = identity.teacher_id(profile), identity.storage_id(profile)
    return _merge(profile.training.identity_fields(), initial=policy_id, teacher=teacher_id, storage_id=storage_id)


def _student_eval(profile: Profile, policy_id: str, slice_name: None) -> dict:
    values = {"answering_id": identity.answering_id(profile), "teacher": identity.teacher_id(profile)}
    return values | _versions([SCORERS["verifier"]])


ASSETS: tuple[Asset, ...] = (
    Asset(
        "queries",
        "Validated, deduplicated queries of one file in `data/queries/`, split into training and held-out ones; no "
        "training query shares text with a held-out one. What was dropped is in `rejections`, with the reason.",
        stage="nbg_core.queries.stage",
        tables=("queries", "rejections"),
        settings=_queries,
        checks=("no_train_eval_overlap", "has_training_queries", "has_held_out_queries"),
        kinds=frozenset({"duckdb", "polars"}),
        loads_model=False,
    ),
    Asset(
        "student_samples",
        "Responses of the promoted policy (the SFT student before the first promotion) to every training query and, "
        "with `sampling.n_teacher`, of the teacher: token ids, log-probs, finish reason. Only missing ones are drawn.",
        stage="nbg_core.sampling.stage",
        tables=("samples",),
        settings=_student_samples,
        upstream=("queries",),
        checks=("every_query_answered", "tokens_in_vocabulary", "few_truncated", "few_empty"),
        plots=("response lengths",),
        group="preferences",
        kinds=frozenset({"pytorch", "huggingface"}),
    ),
    Asset(
        "filtered_pairs",
        "Scored responses and the pairs whose margin is at least `preference.min_margin`. What was not kept is in "
        "`rejections`, with the reason.",
        stage="nbg_core.preference.stage",
        tables=("pairs", "scores", "rejections"),
        settings=_filtered_pairs,
        upstream=("queries", "student_samples"),
        checks=(
            "has_pairs",
            "margins_wide_enough",
            "responses_exist",
            "no_truncated_positive",
            "no_held_out_query",
        ),
        plots=("scores", "margins"),
        group="preferences",
        kinds=frozenset({"duckdb", "polars"}),
    ),
    Asset(
        "teacher_logits",
        "The teacher's log-probabilities (not logits) at every position of chosen and rejected responses, given their "
        "exact token ids: top entries and a sampled tail. The view `teacher_entries` has a row per entry.",
        stage="nbg_core.teacher.stage",
        tables=("teacher_logits",),
        settings=_teacher_logits,
        upstream=("filtered_pairs",),
        checks=("one_row_per_response", "lengths_match", "mass_is_one"),
        plots=("stored distribution",),
        group="distillation",
        kinds=frozenset({"pytorch", "huggingface", "parquet"}),
    ),
    Asset(
        "reference_logprobs",
        "Log-probs of every chosen and rejected token under the policy that training starts from, which is the DPO "
        "reference: before the first step every margin is 0.",
        stage="nbg_core.reference.stage",
        tables=("reference_logprobs",),
        settings=_reference_logprobs,
        upstream=("filtered_pairs",),
        checks=("one_row_per_response", "lengths_match", "sampler_agrees"),
        plots=("sampler drift",),
        group="distillation",
        kinds=frozenset({"pytorch", "huggingface"}),
    ),
    Asset(
        "student_checkpoint",
        "Weights (safetensors) trained with DeepSpeed on DPO plus the divergence to the teacher on chosen and "
        "rejected, over all slices. The lake keeps the snapshot it read and which pair was used at which step.",
        stage="nbg_core.training.stage",
        tables=("checkpoints", "checkpoint_pairs", "training_steps"),
        settings=_student_checkpoint,
        upstream=("filtered_pairs", "teacher_logits", "reference_logprobs"),
        partitioned=False,
        checks=("starts_at_reference", "weights_intact", "training_set_known"),
        plots=metrics.PLOTS,
        group="student",
        kinds=frozenset({"pytorch", "deepspeed", "huggingface"}),
    ),
    Asset(
        "student_eval",
        "Accuracy on the held-out queries of every slice: of the model before training, after it, and of the teacher. "
        "The checkpoint may be promoted when it is significantly better overall and significantly worse on no slice.",
        stage="nbg_core.evaluation.stage",
        tables=("evaluations", "promotions"),
        settings=_student_eval,
        upstream=("queries", "student_checkpoint"),
        partitioned=False,
        checks=("better_than_before",),
        plots=("accuracy",),
        group="student",
        kinds=frozenset({"pytorch", "huggingface"}),
    ),
)

BY_NAME: dict[str, Asset] = {asset.name: asset for asset in ASSETS}
"""Asset name -> asset."""

PARTITIONED: tuple[str, ...] = tuple(asset.name for asset in ASSETS if asset.partitioned)
UNPARTITIONED: tuple[str, ...] = tuple(asset.name for asset in ASSETS if not asset.partitioned)


def get(name: str) -> Asset:
    """The asset of this name. Raises ValueError naming the known ones."""
    return find(BY_NAME, name, "asset")


def partition_name(asset: str, slice_name: str | None) -> str:
    """The name of a partition in logs, errors and file names: `asset` or `asset[slice]`.

    Raises ValueError for an unknown asset, for a name that cannot be a slice's (before any path is made of it), for a
    partitioned asset without a slice, and for an unpartitioned one with a slice."""
    partitioned = get(asset).partitioned
    if partitioned != (slice_name is not None):
        negated, remedy = ("", "name a slice") if partitioned else ("not ", "leave the slice out")
        raise ValueError(f"{asset} is {negated}partitioned by slice, got slice={slice_name!r}; {remedy}")
    if slice_name is None:
        return asset
    check_slice_name(slice_name)
    return f"{asset}[{slice_name}]"


def upstream_partitions(asset: str, slice_name: str | None, slices: list[str]) -> list[tuple[str, str | None]]:
    """The partitions (asset, slice name) that a partition reads: those of its own slice, or of all `slices` if it has
    no slice."""
    own_slices = slices if slice_name is None else [slice_name]
    partitions: list[tuple[str, str | None]] = []
    for name in get(asset).upstream:
        if get(name).partitioned:
            partitions += [(name, own_slice) for own_slice in own_slices]
        else:
            partitions.append((name, None))
    return partitions


def settings_of(asset: str, profile: Profile, policy_id: str, slice_name: str | None) -> dict:
    """The settings that decide a partition's content; a change in any of them makes it stale.

    Raises FileNotFoundError for a missing query file or model folder."""
    return get(asset).settings(profile, policy_id, slice_name)
