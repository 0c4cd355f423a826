"""The settings of a profile, section by section."""

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
    """Folders, absolute or relative to the profile's root."""

    queries: Path = Path("data/queries")
    """Folder of the query files; each file is a slice."""
    checkpoints: Path = Path("data/checkpoints")
    """Folder of trained students, one sub-folder per checkpoint id."""
    work: Path = Path("data/work")
    """Folder of temporary files of runs: requests, logs, locks, resumable training states."""


class LakeSettings(Section):
    catalog: str = "sqlite:data/lake/catalog.sqlite"
    """Where DuckLake keeps its catalog: `sqlite:PATH` on one machine, `postgres:CONNECTION STRING` for many."""
    data_path: str = "data/lake/files"
    """Folder or object-store prefix of the Parquet files."""
    author: str = "nbg"
    """Author recorded with each snapshot of the lake."""

    @field_validator("catalog")
    @classmethod
    def _kind_is_known(cls, catalog: str):
        if not re.match(r"(sqlite|postgres):.", catalog):
            raise ValueError("not a catalog; write it as sqlite:PATH or postgres:CONNECTION STRING")
        return catalog


class Models(Section):
    student: Path
    """Folder of the SFT student (NBG4-3B-SFT), which is the policy until a checkpoint is promoted."""
    teacher: Path
    """Folder of the teacher (NBG3.5-Pro), which must have the student's tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the models in sampling and scoring: float32 with training.precision fp32, bfloat16 with bf16.
    float16 is not supported."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model folder. Leave it off unless you trust that code."""


class QuerySettings(Section):
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of each slice that is held out for evaluation. The query id decides which; a row's own `split` wins."""
    shingle_words: Annotated[int, Field(ge=1)] = 5
    """Words in a shingle, the unit in which near duplicates are compared."""
    near_duplicate_jaccard: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Queries whose sets of shingles have at least this Jaccard similarity are near duplicates."""
    contamination_words: Annotated[int, Field(ge=1)] = 13
    """A training query that shares this many words in a row with a held-out query is dropped."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 192
    """Maximum prompt length, in tokens, with the chat template applied; longer prompts are dropped."""


class SamplingSettings(Section):
    backend: Engine = "transformers"
    """What draws responses, and the answers of the evaluation: `transformers` in a subprocess, or vLLM servers (section
    vllm)."""
    n_student: Annotated[int, Field(ge=0)] = 8
    """Responses per query from the current policy. If you raise it later, only the missing ones are drawn; if you lower
    it, the rest is not used."""
    n_teacher: Annotated[int, Field(ge=0)] = 0
    """Responses per query from the teacher (the published method takes its positives from the teacher)."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: tokens are drawn from the smallest set of most probable ones with at least this mass."""
    max_tokens: Annotated[int, Field(ge=1)] = 48
    """Maximum response length, in tokens, including the end-of-turn token."""
    seed: int = 0
    """Base seed; each response has its own seed, derived from this one and the response's id."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Responses generated at the same time (backend `transformers`)."""
    chunk_queries: Annotated[int, Field(ge=1)] = 128
    """Queries per commit. Finished responses are also committed every 30 s; a crash loses what is not committed."""

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
    """Weight of each scorer in the combined score of a response. A map that you give replaces the default: a scorer
    that it does not name, or gives 0, does not run."""
    min_margin: Annotated[float, Field(gt=0)] = 0.5
    """Minimum difference between the combined scores of chosen and rejected."""
    max_pairs_per_query: Annotated[int, Field(ge=1)] = 2
    """Maximum number of pairs per query. Pairs are taken widest margin first, and no text is used twice."""
    truncated_positive: bool = False
    """Whether a truncated response (finish reason `length`) can be chosen."""

    @model_validator(mode="after")
    def _something_scores(self):
        if not any(self.weights.values()):
            raise ValueError(f"weights has no scorer with a weight; set one of {', '.join(SCORERS)} above 0")
        return self


class TeacherSettings(Section):
    engine: Engine = "transformers"
    """What runs the teacher's forward passes: `transformers`, or vLLM servers, which give top entries only."""
    k_head: Annotated[int, Field(ge=1)] = 64
    """Maximum number of top entries per position: the teacher's most probable tokens, each with its log-probability."""
    m_tail: Annotated[int, Field(ge=0)] = 64
    """Maximum number of tail samples per position: tokens drawn from outside the top entries; 0 stores only the tail's
    mass."""
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    """Probability mass that the top entries may leave out. Where at most k_head tokens, each with at least min_weight,
    suffice for that, the fewest that do are stored and no tail is sampled."""
    min_weight: Annotated[float, Field(ge=0, lt=1)] = 1 / 80
    """Minimum probability of a top entry. A tail gets mass / min_weight samples, rounded up, at most m_tail. With 0,
    every position at which k_head tokens leave out more than epsilon has k_head top entries and m_tail samples."""
    logprob_bits: Annotated[int, Field(ge=1, le=23)] = 6
    """Mantissa bits that stored log-probabilities keep; 23 keeps all of a float32."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the stored distribution; the divergence takes the student's at the same one."""
    seed: int = 0
    """Base seed of the tail samples."""
    batch_tokens: Annotated[int, Field(ge=1)] = 16384
    """Maximum number of tokens per forward pass of teacher and reference scoring, padding included; a longer response
    gets a pass of its own."""
    n_processes: Annotated[int, Field(ge=1)] = 1
    """Processes that score in parallel with engine `transformers`; each has a GPU and a copy of the teacher."""
    chunk_samples: Annotated[int, Field(ge=1)] = 512
    """Responses per commit of `teacher_logits`, `reference_logprobs` and teacher_loglik. Teacher rows are also
    committed every 30 s; a crash loses what is not committed."""


PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
"""`models.dtype` -> the `training.precision` that goes with it. With another one, the policy would differ from its
reference before the first step."""


class EvaluationSettings(Section):
    max_tokens: Annotated[int, Field(ge=1)] = 48
    """Maximum answer length, in tokens."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Answers generated at the same time; answers are greedy."""
    min_queries: Annotated[int, Field(ge=1)] = 20
    """Minimum number of held-out queries, over all slices, that all models have answered; with fewer the promotion gate
    refuses."""
    auto_promote: bool = False
    """Whether a checkpoint that passes the gate is promoted at once."""


class RefreshSettings(Section):
    cron: str = "0 3 * * *"
    """When the refresh schedule runs: minute, hour, day, month, weekday, in `timezone`."""
    timezone: str = "UTC"
    """Time zone of `cron`."""

    @model_validator(mode="after")
    def _can_be_scheduled(self):
        fields = self.cron.split()
        if len(fields) != len(CRON):
            raise ValueError(
                f"cron {self.cron!r} does not have the fields {', '.join(CRON)}; write it like '0 3 * * *', every day "
                "at 3:00"
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
"""Field of a cron line -> the numbers that it may hold, in the order of the fields."""


def _is_cron_part(part: str, allowed: range) -> bool:
    match = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", part)
    return match is not None and all(int(n) in allowed for n in match.groups()[:2] if n)


class Profile(Section):
    """All settings of the pipeline; `load_profile` reads one from a file."""

    name: str
    """Shown in every run's metadata; the file's name unless it is set."""
    root: Path = PROJECT_ROOT
    """Folder that relative paths start from; set by `load_profile`."""
    models: Models
    """Teacher and student."""
    paths: Paths = Paths()
    """Folders of files."""
    lake: LakeSettings = LakeSettings()
    """Where the tables are."""
    queries: QuerySettings = QuerySettings()
    """Ingest of the query files."""
    sampling: SamplingSettings = SamplingSettings()
    """Responses of the student and, if set, the teacher."""
    preference: PreferenceSettings = PreferenceSettings()
    """Selection of pairs."""
    teacher: TeacherSettings = TeacherSettings()
    """Storage of the teacher's distributions."""
    training: TrainingSettings = TrainingSettings()
    """DeepSpeed training."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Held-out evaluation and the promotion gate."""
    vllm: VllmSettings = VllmSettings()
    """The servers of sampling.backend and teacher.engine `vllm`."""
    refresh: RefreshSettings = RefreshSettings()
    """The refresh schedule."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads per worker process, which the ranks of a training share; null leaves the number to torch."""

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
                f"models.dtype {dtype!r} and training.precision {precision!r} do not go together: with other rounding, "
                f"the policy would differ from its reference before the first step; set training.precision to "
                f"{PRECISIONS[dtype]!r}, or change models.dtype"
            )
        return self

    @model_validator(mode="after")
    def _vllm_gives_top_entries_only(self):
        teacher = self.teacher
        needed = {
            "teacher.m_tail": (teacher.m_tail, 0),
            "teacher.min_weight": (teacher.min_weight, 0),
            "teacher.temperature": (teacher.temperature, 1),
            "training.loss.estimator": (self.training.loss.estimator, "bucket"),
        }
        wrong = {key: needed_value for key, (value, needed_value) in needed.items() if value != needed_value}
        if teacher.engine == "vllm" and wrong:
            remedy = ", ".join(f"{key} to {needed_value!r}" for key, needed_value in wrong.items())
            raise ValueError(
                "teacher.engine 'vllm' gives the most probable entries at temperature 1 and no samples of the tail; "
                f"set {remedy}, or teacher.engine to 'transformers'"
            )
        return self

    def resolve(self, path: Path | str) -> Path:
        """The absolute path of `path`, which is relative to the profile's root unless it is absolute."""
        return (self.root / path).resolve()
