"""Time and memory of one training step with the joint loss: `make bench-train` (up to an hour on 2 cores).

There are six cases: Qwen3-shaped models with random weights in float32, on a CPU and without compilation. The last
case has the size of the embedded student and its batches. The variants are in `train_step_variants.py`. A step is
forward and backward to all gradients, without an optimizer; gradients are freed between steps. For each case, in one
process:

1. Check: variants that compute the same thing must have the same loss and gradients, or nothing is written.
2. Memory: one step of each variant under the profiler, which records every allocation of torch, also inside operators.
   `peak_bytes` is the most that is allocated at once, beyond what was there before the step (weights, pairs) and beyond
   the gradients that remain after it.
3. Time: in each round every variant runs one step; the result is the median over the rounds.
4. Operators: one more step of D under the profiler gives the share of each operator in its time. No variant can do
   without the matrix products. `flops` counts those with weights, without attention and without recomputed products:
   the ratio to D's says how much slower a variant would be if nothing else took time.

The loss from hidden states alone (hidden 1024, vocabulary 151,936, 64 stored entries) is compared with three matrix
products of its shapes, each by the faster of torch's two libraries; their mean time is one GEMM. Pairs of 64 tokens
fit the tile (pair-aligned), a pair of 512 does not (recompute).

As in the trainer, large tensors are on huge pages where the system provides them.

`tokens_per_s` counts unique tokens: the prompt of a pair once, and both responses. `--growth` repeats 2 and 3 (3
rounds) for two variants over response length, vocabulary and number of pairs. `--quick` runs small shapes and writes to
a temporary folder. Results go to `results/train_step.json`, `results/train_step_*.png` and a section of README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch: as the trainer does

import matplotlib
import numpy as np
import psutil
import report
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from train_step_variants import Models, Pairs, Step, make_models, make_pairs, steps

from nbg_core.losses.joint import Denominators
from nbg_core.losses.settings import LossSettings
from nbg_core.losses.targets import TeacherTargets
from nbg_core.modeling.lm_head import lm_head_joint_loss
from nbg_core.modeling.lm_head_tiles import linear

HERE = Path(__file__).parent
TOLERANCE = 1e-3
"""Largest difference of a parameter's gradient, relative to its norm; float32."""
GEMMS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
"""Operators that are matrix products."""
OMITTED = re.compile("aten::|_scaled_dot_product_flash_|_for_cpu")
"""Parts of an operator's name that a table does not show."""
SAME = (("A0", "A0 rows", "B", "C", "D", "D lean"), ("A", "TRL", "Liger"))
"""Groups of variants with the same loss: those with the KL from stored entries, and those with the KL over the whole
vocabulary. The loss of TRL DPO must equal the DPO term of A."""


def shape(vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "tie_word_embeddings": False,
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    model: dict
    """Arguments of Qwen3Config."""
    prompt: tuple[int, int]
    """Shortest and longest prompt in tokens."""
    response: tuple[int, int]
    pairs: int = 4


K32, K152 = 32_768, 151_936
CASES = [
    Case("short", shape(K32, 512, 4, 8, 4, 1536), (32, 96), (32, 128)),
    Case("large vocabulary", shape(K152, 512, 4, 8, 4, 1536), (32, 64), (32, 96)),
    Case("long prompt", shape(K32, 512, 4, 8, 4, 1536), (384, 640), (48, 128)),
    Case("long response", shape(K32, 512, 4, 8, 4, 1536), (48, 96), (256, 512)),
    Case("light head", shape(8_192, 384, 12, 6, 3, 1152), (32, 96), (32, 128), pairs=8),
    Case("demo", shape(260, 96, 2, 3, 3, 192), (12, 25), (4, 14), pairs=64),
]
BASE = Case("growth", shape(K32, 512, 4, 8, 4, 1536), (64, 64), (64, 64))
GROWTH = {
    "response length": {n: replace(BASE, response=(n, n)) for n in (64, 128, 256, 512, 1024)},
    "vocabulary": {n: replace(BASE, model=BASE.model | {"vocab_size": n}) for n in (8_192, K32, 65_536, K152)},
    "pairs": {n: replace(BASE, pairs=n) for n in (1, 2, 4, 8, 16)},
}


def quick(case: Case) -> Case:
    """The same case, small enough for a trial run."""
    smaller = {"vocab_size": case.model["vocab_size"] // 16, "hidden_size": 128, "num_hidden_layers": 2}
    lengths = {name: tuple(max(2, n // 8) for n in getattr(case, name)) for name in ("prompt", "response")}
    return replace(case, model=case.model | smaller, **lengths)


def prepare(case: Case) -> tuple[Models, Pairs]:
    rng = np.random.default_rng(0)

    def text(lengths: tuple[int, int]) -> list[int]:
        return rng.integers(case.model["vocab_size"], size=rng.integers(*lengths, endpoint=True)).tolist()

    models = make_models(case.model)
    prompts = [text(case.prompt) for _ in range(case.pairs)]
    return models, make_pairs(models, prompts, [[text(case.response) for _ in range(2)] for _ in prompts])


def run_step(step: Step, models: Models, term: str = "loss") -> float:
    """Run a step and go backward from one of its terms, whose value is returned. Gradients are those of this step."""
    models.student.zero_grad(set_to_none=True)
    terms = step()
    if terms[term].requires_grad:  # the step of TRL's trainer includes its backward pass
        terms[term].backward()
    return terms[term].item()


def check(running: dict[str, Step], models: Models, name: str) -> None:
    """Raise SystemExit unless the variants of each group in SAME agree in loss and every gradient."""

    def loss_and_gradients(variant: str, term: str = "loss") -> tuple[float, dict[str, torch.Tensor]]:
        loss = run_step(running[variant], models, term)
        return loss, {n: p.grad for n, p in models.student.named_parameters()}

    def compare(variant: str, first: str, expected: tuple, term: str = "loss") -> None:
        (loss, gradients), (true_loss, true_gradients) = loss_and_gradients(variant), expected
        error = {n: float((gradients[n] - g).norm() / g.norm()) for n, g in true_gradients.items()}
        worst = max(error, key=error.get)
        print(f"  {variant} and {first}: loss {loss:.6f} and {true_loss:.6f}, gradients within {error[worst]:.1e}")
        if not (abs(loss - true_loss) <= 1e-4 * abs(true_loss) and error[worst] <= TOLERANCE):
            raise SystemExit(f"case {name!r}: {variant} and {first} ({term}) disagree, worst in {worst}; no results")

    for first, *others in SAME:
        expected = loss_and_gradients(first)
        for other in filter(running.get, others):
            compare(other, first, expected)
    if "TRL DPO" in running:
        compare("TRL DPO", "A", loss_and_gradients("A", "dpo"), "dpo")


def peak_bytes(step: Step, models: Models) -> int:
    """See 2 in the module's docstring."""
    models.student.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_step(step, models)
    gradients = {p.grad.untyped_storage().data_ptr() for p in models.student.parameters()}
    events = sorted(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    kept = set()  # a gradient's allocation is the last one at its address
    for i in reversed(range(len(events))):
        _, address, size = events[i]
        if address in gradients and size > 0:
            gradients.remove(address)
            kept.add(i)
    return int(np.cumsum([size for i, (_, _, size) in enumerate(events) if i not in kept]).max())


def _allocations(nodes: list) -> Iterator[tuple[int, int, int]]:
    """Time, address and bytes (negative when freed) of every allocation in a tree of profiler events."""
    for node in nodes:
        if node.tag == _EventType.Allocation:
            yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size
        yield from _allocations(node.children)


def measure(case: Case, repeats: int, only: tuple[str, ...] = ()) -> list[dict]:
    """A row of results for each variant in `only`. Without it all variants are measured, and checked before."""
    models, pairs = prepare(case)
    print(f"{case.name}: {pairs.unique_tokens} unique tokens, {len(pairs.token_ids)} of responses", flush=True)
    found = steps(models, pairs, only)
    running = {n: s for n, s in found.items() if callable(s)}
    if not only:
        check(running, models, case.name)
    peaks = {n: peak_bytes(s, models) for n, s in running.items()}  # also the warm-up
    seconds: dict[str, list[float]] = {n: [] for n in running}
    for _ in range(repeats):
        for name, step in running.items():
            gc.collect()
            start = time.perf_counter()
            run_step(step, models)
            seconds[name].append(time.perf_counter() - start)
    shares, products = {} if only else operators(running["D"], models), flops(models, pairs)
    rows = []
    for name, step in found.items():
        row = {"case": case.name, "shape": {**case.model, "prompt": case.prompt, "response": case.response,
               "pairs": case.pairs}, "vocabulary": case.model["vocab_size"], "variant": name}  # fmt: skip
        if callable(step):
            median = statistics.median(seconds[name])
            row |= {"median_s": median, "tokens_per_s": pairs.unique_tokens / median, "peak_bytes": peaks[name]}
            row |= {"flops": products.get(name)} | ({"operators": shares} if name == "D" and shares else {})
            print(f"  {name:8} {median * 1e3:8.0f} ms {peaks[name] / 1e6:8.1f} MB", flush=True)
        else:
            row |= {"median_s": None, "tokens_per_s": None, "peak_bytes": None, "error": step}
            print(f"  {name:8} {step}", flush=True)
        rows.append(row)
    return rows


def flops(models: Models, pairs: Pairs) -> dict[str, int]:
    """Operations in a step's products with weights, by variant: 2 per weight and token forward, 4 backward."""
    lm_head = models.student.get_output_embeddings().weight.numel()
    embeddings = models.student.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in models.student.parameters()) - lm_head - embeddings
    positions, rows = pairs.padded.ids.numel(), len(pairs.token_ids)
    padded, inputs = 6 * (body + lm_head) * positions, {"B": positions}
    inputs |= {name: pack.ids.numel() for name, pack in (("C", pairs.packed), ("D", pairs.shared))}
    with_live = padded + 2 * 2 * (body + lm_head) * positions  # reference and teacher are live models
    fused = {name: 6 * (body * n + lm_head * rows) for name, n in inputs.items()}
    return {"A": with_live, "A0": padded, "A0 rows": padded, **fused}


def operators(step: Step, models: Models) -> dict[str, float]:
    """Shares of a step's time: of all matrix products together, and of the six other operators that take longest."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run_step(step, models)
    times = {"products": 0.0}
    for event in profiler.key_averages():
        name = "products" if event.key in GEMMS else event.key
        times[name] = times.get(name, 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    others = sorted(times.keys() - {"products"}, key=times.get, reverse=True)
    return {name: times[name] / total for name in ("products", *others[:6])}


def lm_head_gemms(repeats: int) -> dict[str, float]:
    """The time of `lm_head_joint_loss`, forward and backward, in GEMMs (see the module's docstring)."""
    vocab, width, k = K152, 1024, 64
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(vocab, width)).requires_grad_()
    costs = {}
    for name, n_pairs, per_pair in (("pair-aligned", 4, 64), ("recompute", 1, 512)):
        n = n_pairs * per_pair
        hidden, ids = torch.randn(n, width).requires_grad_(), torch.randint(vocab, (n,))
        pair, position = torch.arange(n) // per_pair, torch.arange(n) % per_pair
        entries = torch.stack([torch.randperm(vocab)[:k] for _ in range(n)])
        is_top = (torch.arange(k) < k // 2).expand(n, k)
        targets = TeacherTargets(entries, torch.full((n, k), -4.5), is_top, ~is_top, torch.full((n,), -1.0))
        arguments = (ids, pair, position < per_pair // 2, torch.full((n,), -9.0), targets, n_pairs)
        kwargs = dict(vocab=vocab, settings=LossSettings(), denominators=Denominators(n_pairs, n // 2, n // 2))
        h, w = hidden.detach(), weight.detach()
        z, d_hidden, d_weight = torch.zeros(n, vocab), torch.empty_like(h), torch.empty_like(w)

        def whole(hidden=hidden, arguments=arguments, kwargs=kwargs):
            hidden.grad = weight.grad = None
            lm_head_joint_loss(hidden, weight, *arguments, **kwargs)[0].backward()

        parts = [
            lambda h=h, w=w, z=z: torch.mm(h, w.t(), out=z), lambda z=z, w=w, d=d_hidden: torch.mm(z, w, out=d),
            lambda z=z, h=h, d=d_weight: torch.mm(z.t(), h, out=d), lambda h=h, w=w: linear(h, w),
            lambda z=z, w=w: linear(z, w.t()), lambda z=z, h=h: linear(z.t(), h.t()), whole,
        ]  # fmt: skip
        seconds = [[] for _ in parts]
        for _ in range(repeats + 1):
            for part, found in zip(parts, seconds, strict=True):
                start = time.perf_counter()
                part()
                found.append(time.perf_counter() - start)
        *bare, mine = (statistics.median(s[1:]) for s in seconds)
        costs[name] = mine / statistics.mean(map(min, zip(bare[:3], bare[3:], strict=True)))
    return costs


def tables(rows: list[dict]) -> str:
    """Markdown tables with a line for each case: milliseconds (in brackets as multiples of D's), peak memory, matrix
    products, operators."""
    cases, names = (list(dict.fromkeys(r[key] for r in rows)) for key in ("case", "variant"))
    cells = {(r["case"], r["variant"]): r for r in rows}

    def table(title: str, cell: Callable[[dict, dict], str]) -> list[str]:
        lines = [f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for case in cases:
            found = [
                cells.get((case, n), {"median_s": None}) for n in names
            ]  # rows kept from an earlier run may lack one
            row = [cell(r, cells[case, "D"]) if r["median_s"] else "n/a" for r in found]
            lines.append(f"| {case} | " + " | ".join(row) + " |")
        return [*lines, ""]

    times = table("ms (times of D)", lambda r, d: f"{r['median_s'] * 1e3:.0f} ({r['median_s'] / d['median_s']:.1f})")
    peaks = table("peak, MB", lambda r, d: f"{r['peak_bytes'] / 1e6:.0f}")
    counted = [n for n in names if all(cells.get((case, n), {}).get("flops") for case in cases)]
    products = [f"| matrix products (times of D) | {' | '.join(counted)} |", "|---" * (len(counted) + 1) + "|"]
    for case in cases:
        ratios = [f"{cells[case, n]['flops'] / cells[case, 'D']['flops']:.1f}" for n in counted]
        products.append(f"| {case} | " + " | ".join(ratios) + " |")
    products.append("")
    profiled = [r for r in rows if "operators" in r]
    if profiled:
        products += ["| share of D's time | products | the six other operators that take most |", "|---" * 3 + "|"]
    for r in profiled:
        first, *others = (f"{OMITTED.sub('', name)} {share:.1%}" for name, share in r["operators"].items())
        products.append(f"| {r['case']} | {first.split()[1]} | {', '.join(others)} |")
    errors = sorted({f"{r['variant']} {r['error']}" for r in rows if "error" in r})
    return "\n".join([*times, *peaks, *products, *errors]).strip()


def plot(rows: list[dict], folder: Path) -> list[str]:
    """Plot seconds and peak memory over each axis of growth, one PNG file per axis. Returns the file names."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = []
    for axis in dict.fromkeys(r["axis"] for r in rows):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        for panel, (key, label, unit) in zip(
            panels, (("median_s", "seconds a step", 1), ("peak_bytes", "peak, MB", 1e6)), strict=True
        ):
            for name in dict.fromkeys(r["variant"] for r in rows):
                points = [(r["value"], r[key] / unit) for r in rows if r["axis"] == axis and r["variant"] == name]
                panel.plot(*zip(*points, strict=True), marker="o", label=name)
            panel.set(xlabel=axis, ylabel=label, xscale="log", yscale="log")
            panel.legend()
        files.append(f"train_step_{axis.replace(' ', '_')}.png")
        figure.savefig(folder / files[-1], dpi=110)
        plt.close(figure)
    return files


def write(folder: Path, rows: list[dict], growth: list[dict], gemms: dict, args: argparse.Namespace) -> None:
    """Write results/train_step.json (rows of `growth` have an `axis` and a `value`), plots, and the section of
    README.md."""
    (folder / "results").mkdir(exist_ok=True)
    images = [
        f"![seconds and memory of a step as it grows](results/{file})" for file in plot(growth, folder / "results")
    ]
    cost = [f"The head alone: {', '.join(f'{x:.2f} GEMMs {name}' for name, x in gemms.items())}."] if gemms else []
    some = f" ({', '.join(args.cases)}; the other cases are of an earlier run)" if args.cases else ""
    section = "\n\n".join([f"Median of {args.repeats}{some}; in the plots, of 3.", tables(rows), *cost, *images])
    report.write("train_step", rows + growth, section, report.machine("trl", "liger-kernel"), folder=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--growth", action="store_true", help="also over length, vocabulary and pairs, for plots")
    parser.add_argument(
        "--cases", nargs="+", choices=[c.name for c in CASES], help="measure only these, keep the other rows"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes; writes to a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shrink = quick if args.quick else lambda case: case
    known = json.loads((HERE / "results" / "train_step.json").read_text()) if args.cases else []
    growth = [row for row in known if "axis" in row]
    rows = [
        row
        for case in CASES
        for row in (
            measure(shrink(case), args.repeats)
            if case.name in (args.cases or [case.name])
            else [row for row in known if row["case"] == case.name and "axis" not in row]
        )
    ]
    growth = growth or [
        row | {"axis": axis, "value": value}
        for axis, cases in (GROWTH if args.growth else {}).items()
        for value, case in list(cases.items())[: 2 if args.quick else None]
        for row in measure(shrink(case), min(args.repeats, 3), only=("A0", "D"))
    ]
    folder = HERE
    if args.quick:
        folder = Path(tempfile.mkdtemp())
        shutil.copy(HERE / "README.md", folder)
    gemms = {} if args.quick else lm_head_gemms(args.repeats)
    print(gemms)
    write(folder, rows, growth, gemms, args)
    print(f"\n{tables(rows)}\n\nwritten to {folder}")


if __name__ == "__main__":
    main()
