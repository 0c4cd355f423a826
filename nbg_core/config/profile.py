"""A profile: what can be set, section by section."""

from __future__ import annotations

import re
import zoneinfo
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from nbg_core.base.names import OneOf
from nbg_core.base.section import Section
from nbg_core.config.training import TrainingSettings
from nbg_core.config.vllm import VllmSettings
from nbg_core.scorers.scorers import SCORERS

PROJECT_ROOT = Path(__file__).resolve().parents[2]

Engine = Literal["transformers", "vllm"]
"""What runs a model for sampling or for the teacher's scoring."""
ENGINES: tuple[str, ...] = get_args(Engine)


class Paths(Section):
    queries: Path = Path("data/queries")
    """Folder of the query files; each file is a slice."""
    checkpoints: Path = Path("data/checkpoints")
    """Folder of trained students, one sub-folder per checkpoint id."""
    work: Path = Path("data/work")
    """Folder of what a run needs while it runs: requests, logs, resumable training states."""


class LakeSettings(Section):
    catalog: str = "sqlite:data/lake/catalog.sqlite"
    """`sqlite:PATH` on one machine, `postgres:CONNECTION STRING` for many."""
    data_path: str = "data/lake/files"
    """Folder or object-store prefix of the Parquet files."""
    author: str = "nbg"
    """Author written into each snapshot."""

    @field_validator("catalog")
    @classmethod
    def _kind_is_known(cls, catalog: str):
        if not re.match(r"(sqlite|postgres):.", catalog):
            raise ValueError("write it as sqlite:PATH or postgres:CONNECTION STRING")
        return catalog


class Models(Section):
    student: Path
    """Folder of the SFT student (NBG4-3B-SFT), the policy until a checkpoint is promoted."""
    teacher: Path
    """Folder of the teacher (NBG3.5-Pro); same tokenizer as the student."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype models are loaded in for sampling and scoring: float32 with training.precision fp32, bfloat16 with bf16."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model folder. Leave off unless you wrote that code."""


class QuerySettings(Section):
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of each slice held out for evaluation, chosen by query id; a row's own `split` field wins."""
    shingle_words: Annotated[int, Field(ge=1)] = 5
    """Words per shingle for near-duplicate detection."""
    near_duplicate_jaccard: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Queries whose shingle sets overlap by this Jaccard similarity or more are near duplicates."""
    contamination_words: Annotated[int, Field(ge=1)] = 13
    """A training query sharing a run of this many words with a held-out query is dropped."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 192
    """Longest prompt, in tokens, chat template applied."""


class SamplingSettings(Section):
    backend: Engine = "transformers"
    """Sampler, of held-out answers too: `transformers` in a subprocess, or vLLM servers (section vllm)."""
    n_student: Annotated[int, Field(ge=0)] = 8
    """Responses per query from the current policy."""
    n_teacher: Annotated[int, Field(ge=0)] = 0
    """Responses per query from the teacher (the paper takes its positives from there)."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus probability mass."""
    max_tokens: Annotated[int, Field(ge=1)] = 48
    """Longest response, in tokens, end-of-turn included."""
    seed: int = 0
    """Base seed; each response's own seed is derived from it and the response's id."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Responses generated at once."""
    chunk_queries: Annotated[int, Field(ge=1)] = 128
    """Queries per commit; what finishes is also committed every 30 s: what a crash can lose."""

    @model_validator(mode="after")
    def _enough_responses(self):
        if self.n_student + self.n_teacher < 2:
            raise ValueError("n_student + n_teacher must be at least 2: a pair needs two responses")
        return self


class PreferenceSettings(Section):
    weights: dict[Annotated[str, OneOf("scorer", SCORERS)], Annotated[float, Field(ge=0)]] = {
        "verifier": 1.0,
        "teacher_loglik": 0.0,
    }
    """Weight of each scorer in the combined score; weight 0 scores nothing."""
    min_margin: Annotated[float, Field(gt=0)] = 0.5
    """Smallest chosen - rejected combined score: positive >> negative."""
    max_pairs_per_query: Annotated[int, Field(ge=1)] = 2
    """At most this many pairs of one query, widest margins first, no response twice."""
    truncated_positive: bool = False
    """Let a truncated response (finish reason `length`) be a positive."""

    @model_validator(mode="after")
    def _something_scores(self):
        if not any(self.weights.values()):
            raise ValueError("weights has no scorer with a weight; set verifier or teacher_loglik above 0")
        return self


class TeacherSettings(Section):
    engine: Engine = "transformers"
    """What runs the teacher's forward passes: `transformers`, or vLLM servers, which give top entries only."""
    k_head: Annotated[int, Field(ge=1)] = 64
    """Most probable entries kept exactly, at most."""
    m_tail: Annotated[int, Field(ge=0)] = 64
    """Entries sampled from the mass outside the head, at most; 0 stores the bucket only."""
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    """The head is the smallest that leaves at most this mass outside; then no tail is sampled."""
    min_weight: Annotated[float, Field(ge=0, lt=1)] = 1 / 80
    """Least probability of a head entry, and mass that a tail sample stands for; 0 always takes k_head and m_tail."""
    logprob_bits: Annotated[int, Field(ge=1, le=23)] = 6
    """Bits of mantissa that stored log-probabilities keep; 23 is float32 as it is."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the stored distribution; the student is compared at the same one."""
    seed: int = 0
    """Base seed of the tail samples."""
    batch_tokens: Annotated[int, Field(ge=1)] = 16384
    """Tokens per forward pass, padding included."""
    n_processes: Annotated[int, Field(ge=1)] = 1
    """Processes that score side by side with engine `transformers`, a GPU and a copy of the teacher each."""
    chunk_samples: Annotated[int, Field(ge=1)] = 512
    """Responses per commit; what finishes is also committed every 30 s: what a crash can lose."""


PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
"""The training precision that goes with a dtype of the models: it makes the policy start at its reference."""


class EvaluationSettings(Section):
    max_tokens: Annotated[int, Field(ge=1)] = 48
    """Longest answer, in tokens."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Answers generated at once (greedy)."""
    min_queries: Annotated[int, Field(ge=1)] = 20
    """Held-out queries that the promotion gate needs, over all slices; fewer prove nothing."""
    auto_promote: bool = False
    """Let the refresh job promote a checkpoint that passes the gate."""


class RefreshSettings(Section):
    cron: str = "0 3 * * *"
    """When the refresh schedule runs (cron, `timezone`)."""
    timezone: str = "UTC"
    """Time zone of `cron`."""

    @model_validator(mode="after")
    def _can_be_scheduled(self):
        fields = self.cron.split()
        if len(fields) != len(CRON):
            raise ValueError(
                f"cron {self.cron!r} does not have the fields {', '.join(CRON)}; '0 3 * * *' is 3 at night"
            )
        for field, (name, allowed) in zip(fields, CRON.items(), strict=True):
            if not all(_is_cron_part(part, allowed) for part in field.lower().split(",")):
                raise ValueError(
                    f"cron {self.cron!r}: {field!r} is not a {name}; use *, numbers from {allowed[0]} to "
                    f"{allowed[-1]}, ranges (1-5), lists (1,3) and steps (*/2)"
                )
        if self.timezone not in zoneinfo.available_timezones():
            raise ValueError(f"timezone {self.timezone!r} is not known; use a name like 'UTC' or 'Europe/Berlin'")
        return self


CRON = {"minute": range(60), "hour": range(24), "day": range(1, 32), "month": range(1, 13), "weekday": range(8)}
"""Fields of a cron line, and the numbers that each may hold."""


def _is_cron_part(part: str, allowed: range) -> bool:
    match = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", part)
    return match is not None and all(int(n) in allowed for n in match.groups()[:2] if n)


class Profile(Section):
    name: str
    """Shown in every run's metadata."""
    root: Path = PROJECT_ROOT
    """Folder that relative paths start from; set by `load_profile`."""
    models: Models
    """Teacher and student."""
    paths: Paths = Paths()
    """Where files live."""
    lake: LakeSettings = LakeSettings()
    """Where tables live."""
    queries: QuerySettings = QuerySettings()
    """Ingest."""
    sampling: SamplingSettings = SamplingSettings()
    """Student (and teacher) responses."""
    preference: PreferenceSettings = PreferenceSettings()
    """Pair selection."""
    teacher: TeacherSettings = TeacherSettings()
    """Teacher logits."""
    training: TrainingSettings = TrainingSettings()
    """DeepSpeed training."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Held-out evaluation and the promotion gate."""
    vllm: VllmSettings = VllmSettings()
    """The servers of sampling.backend and teacher.engine `vllm`."""
    refresh: RefreshSettings = RefreshSettings()
    """The refresh schedule."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads per worker process; none leaves it to torch."""

    @model_validator(mode="after")
    def _estimator_has_samples(self):
        if self.training.loss.estimator == "sampled_tail" and not self.teacher.m_tail:
            raise ValueError("training.loss.estimator 'sampled_tail' needs teacher.m_tail > 0; or use 'bucket'")
        return self

    @model_validator(mode="after")
    def _one_precision(self):
        dtype, precision = self.models.dtype, self.training.precision
        if PRECISIONS[dtype] != precision:
            raise ValueError(
                f"models.dtype {dtype!r} and training.precision {precision!r} do not go together: rounded otherwise, "
                f"the policy would not start at its reference; set training.precision to {PRECISIONS[dtype]!r}, or "
                "change models.dtype"
            )
        return self

    @model_validator(mode="after")
    def _vllm_gives_top_entries_only(self):
        t, estimator = self.teacher, self.training.loss.estimator
        needed = {
            "teacher.m_tail": (t.m_tail, 0),
            "teacher.min_weight": (t.min_weight, 0),
            "teacher.temperature": (t.temperature, 1),
            "training.loss.estimator": (estimator, "bucket"),
        }
        wrong = {key: want for key, (have, want) in needed.items() if have != want}
        if t.engine == "vllm" and wrong:
            remedy = ", ".join(f"{key} to {want!r}" for key, want in wrong.items())
            raise ValueError(
                "teacher.engine 'vllm' gives the most probable entries at temperature 1 and no samples of the tail; "
                f"set {remedy}, or teacher.engine to 'transformers'"
            )
        return self

    def resolve(self, path: Path | str) -> Path:
        """`path` below the project root, unless it is absolute."""
        return (self.root / path).resolve()
