"""Loss, training step, trainer and teacher scoring on one CUDA GPU: `make bench-gpu` (about 20 minutes).

Models are Llama-shaped (`SHAPES`; the 3B student has the shape of Nanbeige4-3B), in bf16 and with random weights. All
variants run in one process and take turns. Three run after the others: D compiled, and the losses of TRL and Liger,
which need a teacher. Times are medians of `--repeats`, measured with CUDA events; scoring takes 3 at most. A variant
that runs out of memory gets a row that says so. `--parts` and `--cases` measure only what they name and keep the other
rows of the results.

head      the joint loss from hidden states, forward and backward, in the shape of TRL issue 7244: 8,192 response
          tokens, hidden 4,096, vocabulary 151,936; beside it the three matrix products alone. Its peak memory is all
          that the GPU holds at once, inputs included.
step      forward and backward of one micro-batch of pairs of 2k to 16k tokens, without an optimizer. The variants are
          those of `train_step_variants.py`. Padded ones get no attention mask, so that they use flash attention; TRL
          DPO is TRL's trainer unchanged, with its mask. The 7B teacher, and the reference of TRL's and Liger's kernels,
          are live models. D compiled is D with `training.compile`.
trainer   the DeepSpeed engine as training uses it: ZeRO 1, bf16 with float32 master weights and gradients, AdamW,
          deterministic operators, optimizer steps of 4 micro-batches.
scoring   the teacher's rows for four responses per prompt, ready to be stored, compared with a padded batch that
          computes the logits of every position, their log-softmax and the top 64.

`tokens/s` counts unique tokens: the prompt of a pair once, and both responses. MFU is the share of the vendor's dense
bf16 rate. It counts, for every variant, the operations of the matrix products that D needs: 6 per weight of the layers
and input token, 6 per weight of the output matrix and response token, and per layer 12 times the attention width for
each pair of a query and a key that it sees. Recomputed products and embeddings do not count. The peak memory of a step
is what is held beyond the weights of all models and the student's gradients. Results go to `results/gpu.json` and a
section of README.md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import polars as pl
import report
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step import run_step
from train_step_variants import Models, Pairs, Step, make_pairs, steps
from transformers import LlamaConfig, LlamaForCausalLM

from nbg_core.losses.joint import Denominators
from nbg_core.losses.settings import LossSettings
from nbg_core.losses.targets import TeacherTargets
from nbg_core.modeling.lm_head import lm_head_joint_loss
from nbg_core.training.engine import compile_layers

HERE = Path(__file__).parent
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations a second, by the vendor's data sheets."""
V = 166_144


def llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int = V) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocab, head_dim=128, max_position_embeddings=1 << 15,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


SHAPES = {
    "1B": llama(2048, 16, 16, 8, 8192),
    "3B": llama(2560, 32, 20, 4, 10496),
    "7B": llama(4096, 32, 32, 8, 11008),
}


@dataclass(frozen=True)
class Case:
    student: str
    tokens: int
    """Most tokens of a pair: a quarter for the prompt, three eighths for each response. Actual lengths are random, from
    half of that to all of it."""
    pairs: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        more = ", gradient checkpointing" if self.checkpointing else ""
        return f"{self.student}, {self.pairs} of {self.tokens // 1024}k{more}"


CASES = [
    Case("3B", 2048, 4), Case("3B", 4096, 2), Case("3B", 8192, 1), Case("3B", 16384, 1, True), Case("1B", 2048, 4),
    Case("1B", 8192, 1),
]  # fmt: skip
VARIANTS = ("D", "C", "A0 rows", "TRL", "Liger", "TRL DPO")


def small(config: LlamaConfig) -> LlamaConfig:
    """A tiny shape instead of `config`, for a trial run with or without a GPU."""
    return llama(128, 2, 1, 1, 256, 2048) if config.hidden_size > 128 else config


def model(config: LlamaConfig, device: str, seed: int, train: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        made = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return made.train() if train else made.eval().requires_grad_(False)


def timed(device: str, functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict | str]:
    """For each function its median seconds and peak bytes, or why it failed. They take turns.

    `peak_bytes` is beyond what was allocated before the call, `total_peak_bytes` includes it."""
    found: dict[str, dict | str] = {}
    seconds: dict[str, list[float]] = {}
    for name, function in functions.items():  # the first call is the warm-up
        try:
            function()
            clean(device)
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            function()
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            found[name], seconds[name] = {"peak_bytes": peak - before, "total_peak_bytes": peak}, []
        except torch.cuda.OutOfMemoryError:
            found[name] = "out of memory"
        except Exception as e:
            traceback.print_exc()
            found[name] = f"{type(e).__name__}: {e}"[:200]
        clean(device)
    for _ in range(repeats):
        for name in seconds:
            gc.collect()
            seconds[name].append(elapsed(device, functions[name]))
    for name, times in seconds.items():
        found[name] |= {"median_s": statistics.median(times)}
    return found


def clean(device: str) -> None:
    """Free unused memory and start a new measurement of the peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def elapsed(device: str, function: Callable[[], None]) -> float:
    """Seconds of a call on the GPU; 1 on a CPU, where nothing is timed."""
    if device == "cpu":
        function()
        return 1.0
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    function()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


# --- head ------------------------------------------------------------------------------------------------------


def lm_head(device: str, quick: bool, repeats: int, cases: list[str] | None) -> list[dict]:
    n, width, vocab, k = (64, 32, 512, 8) if quick else (8192, 4096, 151_936, 64)
    torch.manual_seed(0)
    options = {"device": device, "dtype": torch.bfloat16}
    hidden = torch.randn(n, width, **options).requires_grad_()
    weight = (0.02 * torch.randn(vocab, width, **options)).requires_grad_()
    ids = torch.randint(vocab, (n,), device=device)
    entries = torch.randint(vocab, (n, k), device=device)
    is_top = (torch.arange(k, device=device) < k // 2).expand(n, k)
    stored = TeacherTargets(
        entries, torch.full((n, k), -4.5, device=device), is_top, ~is_top, torch.full((n,), -1.0, device=device)
    )
    reference = torch.full((n,), -9.0, device=device)

    def project(pairs: int, **kwargs) -> None:
        per_pair = n // pairs
        hidden.grad = weight.grad = None
        row = torch.arange(n, device=device)
        loss, _, _ = lm_head_joint_loss(
            hidden, weight, ids, row // per_pair, row % per_pair < per_pair // 2, reference, stored, pairs,
            vocab=vocab, settings=LossSettings(**kwargs), denominators=Denominators(pairs, n // 2, n // 2),
        )  # fmt: skip
        loss.backward()

    def trl() -> None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

        hidden.grad = weight.grad = None
        logps = ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, CHUNK, None, 1.0, ("log_probs",))[0]
        kl, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, teacher_weight, None, 0.0)
        margin = (logps - reference).view(8, 2, -1).sum(-1) @ torch.tensor([1.0, -1.0], device=device)
        (2 * kl.mean() - torch.nn.functional.logsigmoid(0.1 * margin).mean()).backward()

    def liger() -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearJSDLoss

        hidden.grad = weight.grad = None
        dpo, _ = LigerFusedLinearDPOLoss(beta=0.1)(
            weight, hidden.view(16, -1, width), ids.view(16, -1), ref_input=hidden.detach().view(16, -1, width),
            ref_weight=weight.detach(),
        )  # fmt: skip
        kl = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)(
            hidden, weight, teacher, teacher_weight, ids
        )
        (dpo + 2 * kl).backward()

    def bare() -> None:
        z = h @ w.t()
        z @ w
        z.t() @ h

    h, w = hidden.detach(), weight.detach()
    found = timed(device, {
        "three bare products": bare,
        "D, pairs of 2,048 response tokens": lambda: project(n // (16 if quick else 2048)),
        "D, pairs of 2,048, bucket": lambda: project(n // (16 if quick else 2048), estimator="bucket"),
        "D, pairs of 2,048, temperature 2": lambda: project(n // (16 if quick else 2048), temperature=2.0),
        "D, a pair of 8,192 (recompute)": lambda: project(1),
    }, repeats)  # fmt: skip
    hidden.grad = weight.grad = None
    teacher, teacher_weight = torch.randn(n, width, **options), 0.02 * torch.randn(vocab, width, **options)
    found |= timed(device, {"TRL's kernels": trl, "Liger's kernels": liger}, repeats)
    return result_rows("head", {"case": f"{n} tokens, hidden {width}, vocabulary {vocab}"}, found)


def result_rows(part: str, about: dict, found: dict[str, dict | str]) -> list[dict]:
    """What `timed` found, as rows of the results; they are printed."""
    rows = []
    for variant, values in found.items():
        values = {"error": values} if isinstance(values, str) else values
        rows.append({"part": part, **about, "variant": variant, **values})
        print(rows[-1], flush=True)
    return rows


# --- step ------------------------------------------------------------------------------------------------------


def step(device: str, quick: bool, repeats: int, cases: list[str] | None) -> list[dict]:
    rows = []
    shapes = {name: small(c) if quick else c for name, c in SHAPES.items()}
    teacher = model(shapes["7B"], device, 2)
    models: Models | None = None
    for case in CASES:
        if cases and case.name not in cases:
            continue
        if quick:
            case = replace(case, tokens=case.tokens // 32)
        if models is None or models.student.config is not shapes[case.student]:
            models = None
            clean(device)
            config = shapes[case.student]
            models = Models(model(config, device, 0, train=True), model(config, device, 1), teacher)
        student = models.student
        pairs = make_case(case, models)
        if case.checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found = {name: lazy_step(name, models, pairs) for name in VARIANTS}
        done = timed(device, found, repeats)
        student.gradient_checkpointing_disable()
        done |= timed(device, {"D compiled": lazy_step("D compiled", models, pairs, case.checkpointing)}, repeats)
        for layer in student.modules():  # `compile_layers` has put its `forward` into each layer
            vars(layer).pop("forward", None)
        needed = flops(student.config, pairs)
        for values in done.values():
            if isinstance(values, dict):
                seconds = values["median_s"]
                values |= {"mfu": needed / seconds / peak_flops(), "tokens_per_s": pairs.unique_tokens / seconds}
        about = {"case": case.name, "unique_tokens": pairs.unique_tokens, "flops": needed}
        rows += result_rows("step", about, done)
        if device == "cuda" and not case.checkpointing and case.tokens == 8192:
            rows += result_rows("profile", about, {"D": {"kernels": kernels(found["D"])}})
        student.zero_grad(set_to_none=True)
        del pairs, found
    return rows


def make_case(case: Case, models: Models) -> Pairs:
    """Random pairs of a case's lengths."""
    rng = np.random.default_rng(0)
    vocab = models.student.config.vocab_size

    def text(most: int) -> list[int]:
        return rng.integers(vocab, size=rng.integers(most // 2, most, endpoint=True)).tolist()

    prompts = [text(case.tokens // 4) for _ in range(case.pairs)]
    pairs = make_pairs(models, prompts, [[text(3 * case.tokens // 8) for _ in range(2)] for _ in prompts])
    return replace(pairs, padded=replace(pairs.padded, mask=None))  # no mask needed: padding is on the right


def lazy_step(name: str, models: Models, pairs: Pairs, checkpointing: bool = False) -> Callable[[], None]:
    """A function that runs one step of a variant, which is made at the first call. "D compiled" must be run last,
    because it leaves the layers compiled."""
    made: list[Step] = []

    def call() -> None:
        if not made:
            if name == "D compiled":
                compile_layers(models.student, checkpointing)
            (found,) = steps(models, pairs, [name.split()[0] if name == "D compiled" else name]).values()
            if isinstance(found, str):
                raise ImportError(found)
            made.append(found)
        run_step(made[0], models)

    return call


def flops(config: LlamaConfig, pairs: Pairs) -> int:
    """Operations of D's step, forward and backward (see MFU in the module's docstring)."""
    width = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    layer = 2 * config.hidden_size * (width + narrow) + 3 * config.hidden_size * config.intermediate_size
    seen = sum(n * (2 * m - n + 1) // 2 for n, m in pairs.shared.segments)  # pairs of a query and a key it sees
    return (
        6 * layer * config.num_hidden_layers * pairs.shared.ids.numel()
        + 12 * width * config.num_hidden_layers * seen
        + 6 * config.hidden_size * config.vocab_size * len(pairs.token_ids)
    )


def peak_flops() -> float:
    """Operations per second of this GPU in PEAK_FLOPS; NaN if it is not there."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for card, rate in PEAK_FLOPS.items() if card in name), float("nan"))


def kernels(function: Callable[[], None]) -> dict[str, float]:
    """The share of each kind of kernel in the time of a call; `idle` is the time in which the GPU runs none."""
    kinds = {"attention": ("flash", "fmha"), "products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "sm80_xmma")}
    microseconds = elapsed("cuda", function) * 1e6
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    shares: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA:
            name = event.key.lower()
            kind = next((k for k, words in kinds.items() if any(w in name for w in words)), "elementwise and the rest")
            shares[kind] = shares.get(kind, 0.0) + event.self_device_time_total / microseconds
    return shares | {"idle": 1 - sum(shares.values())}


# --- trainer ---------------------------------------------------------------------------------------------------


def trainer(device: str, quick: bool, repeats: int, cases: list[str] | None) -> list[dict]:
    from nbg_core.config.training import TrainingSettings
    from nbg_core.training.data import PairBatch
    from nbg_core.training.engine import backward, build_engine, take_step
    from nbg_core.training.request import TrainingRequest
    from nbg_core.training.train import be_deterministic, init_distributed

    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
    }
    init_distributed()
    be_deterministic()
    rows = []
    for case, compiled in itertools.product((Case("1B", 8192, 1), Case("3B", 8192, 1)), (False, True)):
        if cases and case.name not in cases:
            continue
        if quick:
            case = replace(case, tokens=case.tokens // 32)
        shape = small(SHAPES[case.student]) if quick else SHAPES[case.student]
        with SavedModel(shape, device) as folder:
            settings = TrainingSettings(precision="bf16", zero_stage=1, learning_rate=1e-6, compile=compiled)
            engine, _ = build_engine(TrainingRequest(
                training_id="", catalog="", data_path="", snapshot=0, slices=[], policy_id="", policy_path=folder,
                teacher_id="", storage_id="", scoring_id="", temperature=1.0, training=settings, work=folder,
            ))  # fmt: skip
        policy = engine.module.policy
        pairs = make_case(case, Models(policy, policy, policy))
        batch = PairBatch(
            pairs.shared,
            pairs.token_ids,
            pairs.pair_index,
            pairs.is_chosen,
            pairs.reference_logps,
            pairs.targets,
            pairs.n,
        )
        counts = pairs.denominators
        counts = Denominators(4 * counts.pairs, 4 * counts.chosen_tokens, 4 * counts.rejected_tokens)

        def optimizer_step(engine=engine, batch=batch, counts=counts, settings=settings) -> None:
            for _ in range(4):
                backward(engine, engine(batch, counts)[0])
            take_step(engine, settings, 1e-6)

        done = timed(device, {"trainer, compiled" if compiled else "trainer": optimizer_step}, repeats)
        for values in done.values():
            if isinstance(values, dict):
                seconds = values["median_s"]
                values |= {"mfu": 4 * flops(shape, pairs) / seconds / peak_flops(),
                           "tokens_per_s": 4 * pairs.unique_tokens / seconds}  # fmt: skip
        rows += result_rows("trainer", {"case": case.name, "unique_tokens": pairs.unique_tokens}, done)
        engine.destroy()
        del engine, policy, pairs, batch, optimizer_step
        clean(device)
    return rows


class SavedModel:
    """A temporary folder with a model of random weights and a tokenizer with as many ids; in memory (/dev/shm) where
    possible."""

    def __init__(self, config: LlamaConfig, device: str):
        self.config, self.device = config, device

    def __enter__(self) -> Path:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        model(self.config, self.device, 0).save_pretrained(self.folder.name)
        words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, self.config.vocab_size)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", chat_template="{{ messages }}"
        ).save_pretrained(self.folder.name)
        clean(self.device)
        return Path(self.folder.name)

    def __exit__(self, *_) -> None:
        self.folder.cleanup()


# --- scoring ---------------------------------------------------------------------------------------------------


def scoring(device: str, quick: bool, repeats: int, cases: list[str] | None) -> list[dict]:
    from nbg_core.config.profile import Profile
    from nbg_core.modeling.scoring import LogprobModel
    from nbg_core.teacher.store import compress

    config = small(SHAPES["7B"]) if quick else SHAPES["7B"]
    shrink = 32 if quick else 1
    rows = []
    with SavedModel(config, device) as folder:
        paths = {"work": folder, "queries": folder, "checkpoints": folder}
        profile = Profile(name="bench", models={"student": folder, "teacher": folder, "dtype": "bfloat16"}, paths=paths,
                          training={"precision": "bf16"})  # fmt: skip
        scorer = LogprobModel(profile, folder)
    for prompt, response, n_prompts in ((256, 512, 16), (2048, 512, 8), (256, 4096, 2)):
        rng = np.random.default_rng(0)
        prompts = rng.integers(2, config.vocab_size, (n_prompts, prompt // shrink)).tolist()
        responses = rng.integers(2, config.vocab_size, (4 * n_prompts, response // shrink)).tolist()
        samples = pl.DataFrame({
            "sample_id": [f"{i:032}" for i in range(len(responses))], "token_ids": responses,
            "prompt_token_ids": [p for p in prompts for _ in range(4)],
        })  # fmt: skip

        def project(samples=samples, **settings) -> None:
            s = profile.teacher.model_copy(update=settings)
            for scored in scorer.score(samples):
                compress(
                    scorer.logits(scored), scored.token_ids, scored.lengths, scored.samples["sample_id"].to_list(), s
                )

        def forward(samples=samples) -> None:
            for scored in scorer.score(samples):
                scorer.logps(scored)

        @torch.inference_mode()
        def plain(samples=samples, per_batch=16384 // (prompt + response)) -> None:
            for part in samples.iter_slices(per_batch):
                sequences = [p + r for p, r in part.select("prompt_token_ids", "token_ids").iter_rows()]
                logp = scorer.model(torch.tensor(sequences, device=device)).logits.float().log_softmax(-1)
                values, ids = logp.topk(64)
                values.cpu(), ids.cpu()

        done = timed(device, {
            "project": project, "project, head 64 alone": lambda: project(m_tail=0, min_weight=0.0),
            "forward alone": forward, "plain": plain,
        }, min(repeats, 3))  # fmt: skip
        tokens = 4 * n_prompts * (response // shrink)
        layer = 2 * config.hidden_size * 128 * (config.num_attention_heads + config.num_key_value_heads)
        layer += 3 * config.hidden_size * config.intermediate_size
        inputs = n_prompts * (prompt // shrink) + tokens
        least = 2 * (layer * config.num_hidden_layers * inputs + config.hidden_size * config.vocab_size * tokens)
        for values in done.values():
            if isinstance(values, dict):
                seconds = values["median_s"]
                values |= {"tokens_per_s": tokens / seconds, "mfu": least / seconds / peak_flops()}
        rows += result_rows("scoring", {"case": f"{n_prompts} prompts of {prompt}, 4 responses of {response}"}, done)
    return rows


# --- results ---------------------------------------------------------------------------------------------------

PARTS = {"head": lm_head, "step": step, "trainer": trainer, "scoring": scoring}


def section(rows: list[dict]) -> str:
    """The results as Markdown tables, one for each part."""

    def of(part: str) -> Iterator[dict]:
        return (r for r in rows if r["part"] == part)

    def cells(r: dict, *extra: str) -> list[str]:
        if "error" in r:
            return [r["error"], *[""] * len(extra)]
        units = {"peak_bytes": 2**30, "total_peak_bytes": 2**30, "median_s": 1e-3, "mfu": 0.01, "tokens_per_s": 1}
        formats = {
            "tokens_per_s": ",.0f",
            "peak_bytes": ".1f",
            "total_peak_bytes": ".1f",
            "mfu": ".1f",
            "median_s": ".1f",
        }
        return [format(r[k] / units[k], formats[k]) for k in ("median_s", *extra)]

    parts = []
    for part, (name, peak, *extra) in {
        "head": ("the head alone", "total_peak_bytes"),
        "step": ("micro-batch, forward and backward", "peak_bytes", "tokens_per_s", "mfu"),
        "trainer": ("4 micro-batches and an update", "total_peak_bytes", "tokens_per_s", "mfu"),
        "scoring": ("responses scored", "peak_bytes", "tokens_per_s", "mfu"),
    }.items():
        memory = {"total_peak_bytes": "GPU holds at most, GiB", "peak_bytes": "beyond weights and gradients, GiB"}[peak]
        header = [name, "variant", "ms", *(["tokens/s", "MFU, %"] if extra else []), memory]
        if any(of(part)):
            parts.append(report.table(header, [[r["case"], r["variant"], *cells(r, *extra, peak)] for r in of(part)]))
    for r in of("profile"):
        shares = ", ".join(f"{name} {share:.1%}" for name, share in r["kernels"].items())
        parts.append(f"Where D's time goes ({r['case']}): {shares}.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", help="only the cases with these names")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on a CPU if there is no GPU; writes nothing")
    parser.add_argument("--write", type=Path, help="write the rows to this file, and nothing else")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        raise SystemExit("there is no GPU that torch can use; --quick runs without one")
    results = HERE / "results" / "gpu.json"
    rows = json.loads(results.read_text()) if results.exists() and not args.quick else []
    about = report.machine("trl", "liger-kernel", "deepspeed", "triton")
    for part in args.parts:
        new = [about | r for r in PARTS[part](device, args.quick, args.repeats, args.cases)]
        again = {(r["part"], r["case"], r["variant"]) for r in new}
        rows = [r for r in rows if (r["part"], r["case"], r["variant"]) not in again] + new
        clean(device)
        if args.write:
            args.write.write_text(json.dumps(rows, indent=1) + "\n")
        elif not args.quick:
            report.write("gpu", rows, section(rows), about)
    print(section(rows))


if __name__ == "__main__":
    main()
