"""Profile: one YAML file = one way to run the pipeline.

A profile is chosen by `NBG_PROFILE` (a name in profiles/ or a path), default `embedded`. Every field is declared
here with its unit and meaning; an unknown key is refused with the nearest known one. Relative paths are resolved
against the project root: `NBG_ROOT`, else the folder above `profiles/` that the file came from.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import re
import zoneinfo
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nbg_core.ids import digest

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class ProfileError(ValueError):
    """A profile that cannot be used: names the file, the key, the value and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(),
                              allow_inf_nan=False)  # fmt: skip

    def settings_id(self, *more: Any) -> str:
        """Hash of this section (and `more`), the part of lineage that says 'made with other settings'."""
        return digest(self.model_dump(mode="json"), *more)


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
    backend: Literal["transformers", "vllm"] = "transformers"
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
    weights: dict[Literal["verifier", "teacher_loglik"], Annotated[float, Field(ge=0)]] = {
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
    engine: Literal["transformers", "vllm"] = "transformers"
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


STORE_VERSION = 4
"""Raised when the same settings give other stored teacher rows."""

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
"""The training precision that goes with a dtype of the models: it makes the policy start at its reference."""

DpoVariant = Literal["sigmoid", "sigmoid_norm", "ipo", "hinge"]
Divergence = Literal["forward", "reverse", "jsd"]
Estimator = Literal["sampled_tail", "bucket"]


class LossConfig(Section):
    w_dpo: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the sequence-level DPO term; a term of weight 0 is reported and not trained on."""
    w_pos: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the token-level divergence on the chosen."""
    w_neg: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the token-level divergence on the rejected."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """DPO inverse temperature."""
    dpo_variant: DpoVariant = "sigmoid"
    """DPO loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped preferences (cDPO)."""
    nll_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen's negative log-likelihood per token (RPO anchor)."""
    divergence: Divergence = "forward"
    """Token-level divergence between teacher and student; forward is KL(teacher || student)."""
    estimator: Estimator = "sampled_tail"
    """`sampled_tail`: unbiased forward KL; `bucket`: everything outside the head is one outcome."""
    jsd_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Teacher's weight in the generalised Jensen-Shannon mixture."""
    scale_by_temperature_squared: bool = True
    """Multiply the divergence by temperature^2, so that its gradient keeps its size (Hinton et al. 2015)."""

    @model_validator(mode="after")
    def _estimator_fits(self):
        if self.estimator == "sampled_tail" and self.divergence != "forward":
            raise ValueError(f"divergence {self.divergence!r} needs estimator 'bucket'")
        if self.label_smoothing and self.dpo_variant in ("ipo", "hinge"):
            raise ValueError(f"label_smoothing has no meaning with dpo_variant {self.dpo_variant!r}; set it to 0")
        return self


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021): W + alpha / rank * B A, B 0 at the start. No dropout: the policy is compared
    with a reference without it."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of A and B."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale of the update, over `rank`."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear` is all but the output matrix."""


class TrainingSettings(Section):
    loss: LossConfig = LossConfig()
    """The joint loss."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the pairs."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimizer steps."""
    global_batch_pairs: Annotated[int, Field(ge=1)] = 64
    """Pairs per optimizer step, over all ranks and accumulation."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 16384
    """Tokens that go through the student in one forward pass on one rank; a longer pair has a pass of its own."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps with linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after warm-up."""
    min_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW betas."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the training weights (bf16 keeps fp32 master weights): that of models.dtype."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; with bf16, 0 runs as 1."""
    offload_optimizer: bool = False
    """Keep the fp32 master weights and Adam's moments in CPU memory and update them there (ZeRO stage 1 or more)."""
    n_processes: Annotated[int, Field(ge=1)] = 1
    """Ranks on this machine (or per node with a hostfile)."""
    hostfile: Path | None = None
    """DeepSpeed hostfile; none trains on this machine alone."""
    sequence_parallel: Annotated[int, Field(ge=1)] = 1
    """Ranks of a machine that share the tokens of a micro-batch, for pairs too long for one; divides the heads."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool = False
    """Compile the model's layers (`torch.compile`), which fuses what lies between matrix products: faster on a GPU,
    after a slower start; sums round otherwise. Not with zero_stage 3; needs a C and a C++ compiler. Like the settings
    above, it makes no other training of one that is done."""
    lora: LoraSettings | None = None
    """Train low-rank adapters alone, merged into the weights at the end; none trains all weights."""
    save_every: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps between resumable states: what a crash can lose."""
    seed: int = 0
    """Seed of the data order and of the adapters' first weights."""

    @model_validator(mode="after")
    def _offload_has_a_stage(self):
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3: without ZeRO there is nothing to offload")
        return self

    @model_validator(mode="after")
    def _compiled_layers_are_whole(self):
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile needs zero_stage 0, 1 or 2: stage 3 takes layers apart between their uses")
        return self

    @model_validator(mode="after")
    def _sequences_are_shared_by_whole_groups(self):
        if self.n_processes % self.sequence_parallel:
            raise ValueError(
                f"n_processes={self.n_processes} is no multiple of sequence_parallel={self.sequence_parallel}: ranks "
                "share sequences in groups of that size"
            )
        return self

    def deciding(self) -> dict:
        """What decides the trained weights, up to rounding.

        Ranks, ZeRO stage, offload, micro-batches and recomputation share out the same sums in another way: a training
        that died on 8 ranks is the same training on 4, and goes on from its state there."""
        return self.model_dump(mode="json", exclude=_HOW_A_TRAINING_RUNS)


_HOW_A_TRAINING_RUNS = {"micro_batch_tokens", "zero_stage", "offload_optimizer", "n_processes", "hostfile",
                        "sequence_parallel", "gradient_checkpointing", "compile", "save_every"}  # fmt: skip


class EvaluationSettings(Section):
    max_tokens: Annotated[int, Field(ge=1)] = 48
    """Longest answer, in tokens."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Answers generated at once (greedy)."""
    auto_promote: bool = False
    """Let the refresh job promote a checkpoint that passes the gate."""


class VllmSettings(Section):
    python: Path = Path(".venv-vllm/bin/python")
    """Interpreter of the environment that vLLM is installed in (`make vllm` builds it)."""
    version: str = "0.32.0"
    """Version that the servers must be of; part of the keys of what they make."""
    addresses: tuple[str, ...] = ()
    """Base URLs of servers that run already, like http://host:8000, each serving one of the models under its model id;
    none: a server is started for each stage that needs one, and stopped after it."""
    args: tuple[str, ...] = ()
    """More arguments for the server that we start, like --tensor-parallel-size=8 or --gpu-memory-utilization=0.85.
    Those that may change what a model answers (--quantization=fp8) are part of the keys of what it makes."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Longest sequence our server takes, in tokens; none is the model's own."""
    max_in_flight: Annotated[int, Field(ge=1)] = 64
    """Requests that wait for an answer at once, over all servers: what a killed server can lose."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds a request may take before it is tried again."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Seconds our server may take until it answers."""

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
            if _name(arg) == "--max-model-len":
                raise ValueError(f"{arg!r} is a setting of its own: vllm.max_model_len")
        return args

    def deciding_args(self) -> list[str]:
        """Arguments of our own servers that may change what a model answers."""
        if self.addresses:
            return []
        return sorted(a for a in self.args if _name(a) not in _HOW_A_SERVER_RUNS)


def _name(arg: str) -> str:
    return arg.partition("=")[0].replace("_", "-")


_HOW_A_SERVER_RUNS = {
    "--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size", "--enable-expert-parallel",
    "--distributed-executor-backend", "--gpu-memory-utilization", "--kv-cache-memory-bytes", "--cpu-offload-gb",
    "--swap-space", "--block-size", "--max-num-seqs", "--max-num-batched-tokens",
    "--max-parallel-loading-workers", "--enforce-eager", "--uvicorn-log-level", "--disable-log-stats",
}  # fmt: skip


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

    def engine_version(self, engine: str) -> list[str]:
        """A sampling backend or teacher engine with the versions of what it computes with."""
        if engine == "vllm":
            return [engine, self.vllm.version, *self.vllm.deciding_args()]
        return [engine, *(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers"))]

    def sampling_id(self) -> str:
        """Hash of what changes a response's distribution or draw, and nothing else (n and batching do not)."""
        s = self.sampling
        made_by = self.engine_version(s.backend)
        return digest("sampling", self.models.dtype, made_by, s.temperature, s.top_p, s.max_tokens, s.seed)

    def storage_id(self) -> str:
        """Hash of what changes the stored teacher rows, besides the teacher."""
        stored = self.teacher.model_dump(mode="json", exclude={"batch_tokens", "chunk_samples", "n_processes"})
        return digest("teacher", STORE_VERSION, self.models.dtype, self.engine_version(self.teacher.engine), stored)

    def scoring_id(self) -> str:
        """Hash of what changes the log-probabilities that a model gives a response, besides the model."""
        return digest("scoring", self.models.dtype)

    def answering_id(self) -> str:
        """Hash of what changes a model's greedy answer to a held-out query, besides the model."""
        made_by = self.engine_version(self.sampling.backend)
        return digest("evaluation", self.models.dtype, made_by, self.evaluation.max_tokens)

    def resolve(self, path: Path | str) -> Path:
        """`path` below the project root, unless it is absolute."""
        return (self.root / path).resolve()


class _EveryKeyOnce(yaml.SafeLoader):
    """YAML in which the second of two equal keys is an error; else it would silently replace the first."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"key {key.value!r} is there twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def load_profile(which: str | Path | None = None) -> Profile:
    """The profile named or at the path `which`, else `NBG_PROFILE`, else `embedded`.

    Raises ProfileError for a missing file, bad YAML, an unknown key or a bad value."""
    which = str(which or os.environ.get("NBG_PROFILE") or "embedded")
    path = Path(which) if which.endswith((".yaml", ".yml")) else PROJECT_ROOT / "profiles" / f"{which}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (PROJECT_ROOT / "profiles").glob("*.yaml"))
        raise ProfileError(f"no profile {which!r} at {path}; known profiles: {', '.join(known)}, or give a .yaml path")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _EveryKeyOnce) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ProfileError(f"{path}: not valid YAML: {e}") from e
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: a profile is a mapping of keys, got {type(data).__name__}")
    root = Path(os.environ.get("NBG_ROOT") or PROJECT_ROOT)
    data = {"root": root, "name": path.stem, **data}
    try:
        return Profile.model_validate(data)
    except ValidationError as e:
        raise ProfileError(f"{path}: " + "; ".join(_explain(err, Profile) for err in e.errors())) from e


def _explain(error: dict, model: type[BaseModel]) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        for part in error["loc"][:-1]:
            model = _section(model.model_fields[part].annotation)
        near = difflib.get_close_matches(str(error["loc"][-1]), model.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(model.model_fields)}"
        return f"unknown key {where!r}; {hint}"
    if error["type"] == "missing":
        return f"missing key {where!r}"
    return f"{where} = {error['input']!r}: {error['msg']}" if where else error["msg"]


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or may hold (`Section | None`); None for a plain value."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def reference() -> str:
    """Every setting of a profile as a Markdown table: key, default, meaning."""

    def rows(model: type[BaseModel], prefix: str):
        for name, field in model.model_fields.items():
            section = _section(field.annotation)
            if (section is None or field.default is None) and prefix + name != "root":
                default = "required" if field.is_required() else f"`{_plain(field.default)}`"
                yield f"| `{prefix}{name}` | {default} | {' '.join(field.description.split())} |"
            if section is not None:
                yield from rows(section, f"{prefix}{name}.")

    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows(Profile, "")]) + "\n"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
