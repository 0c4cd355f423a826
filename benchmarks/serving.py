"""Sampling and teacher scoring with transformers and with vLLM, and a simple implementation: `make bench-serve`.

The model is SmolLM2-135M-Instruct (see teacher_store.py) in float32, on this machine. Each variant runs in a process of
its own and does the work twice; the first time is the warm-up and does not count.

Sampling: 4 responses to each of 16 prompts, at most 64 tokens, temperature 1, with `sampling.backend` transformers and
vllm.

Scoring: the responses from sampling (`short`); half of them with 512 more random tokens in the prompt, as from a system
prompt, documents or examples (`long prompt`); and 4 random responses of 1,024 tokens (`long`).

    project        `teacher.engine` transformers: the output matrix is applied to response positions only, logits exist
                   for one tile at a time, and responses to one prompt share its computation; the result is rows that
                   can be stored
    plain          a padded batch of 8: logits of every position, log-softmax, top 64
    vLLM           `teacher.engine` vllm: prompt_logprobs, top 64, from a server on the same machine

`tokens/s` counts response tokens. Peak memory is the most resident memory of the process, as the system records it, or
of the server and its children together, measured ten times a second. Results go to results/sampling.json,
results/scoring.json and sections of README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import polars as pl
import psutil
import report
import torch
from teacher_store import PROMPTS, smollm2

from nbg_core.config.profile import Profile
from nbg_core.lake.lake import Lake
from nbg_core.lineage.run import Run
from nbg_core.modeling.loading import load_model, load_tokenizer
from nbg_core.modeling.padded import pad
from nbg_core.sampling.backends import open_sampler
from nbg_core.sampling.sampler import Decoding, SamplingRequest
from nbg_core.teacher.engine import open_engine

N, MAX_TOKENS, LONG, TOP = 4, 64, 1024, 64
"""Responses per prompt; tokens of a sampled and of a long response, at most; entries of the teacher per position."""
LONG_PROMPT = 512
"""Tokens that a long prompt has more."""


def make_run(folder: Path, *, backend: str = "transformers", engine: str = "transformers") -> Run:
    vllm = {"python": os.environ.get("NBG_VLLM_PYTHON", ".venv-vllm/bin/python"), "max_model_len": 2048}
    top = {"engine": engine, "k_head": TOP, "m_tail": 0, "min_weight": 0.0} if engine == "vllm" else {}
    profile = Profile(
        name="bench", models={"student": folder / "model", "teacher": folder / "model"}, vllm=vllm,
        sampling={"backend": backend, "max_tokens": MAX_TOKENS}, teacher=top,
        training={"loss": {"estimator": "bucket" if top else "sampled_tail"}},
        paths={"work": folder / "work", "queries": folder, "checkpoints": folder / "checkpoints"},
        lake={"catalog": f"sqlite:{folder}/catalog.sqlite", "data_path": str(folder / "files")},
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return Run(profile, Lake.of(profile), log=lambda line: None)


def sample(folder: Path, backend: str) -> dict:
    """Sample with a backend, keep the responses in `folder`; speed and peak memory."""
    began = time.perf_counter()
    with (
        open_sampler(make_run(folder, backend=backend), folder / "model", 64) as sampler,
        Peak(backend == "vllm") as peak,
    ):
        started = time.perf_counter() - began
        prompts = [sampler.encode([{"role": "user", "content": p}]) for p in PROMPTS]
        for repeat in range(2):
            asked = [SamplingRequest(p, [100 * repeat + 10 * i + j for j in range(N)]) for i, p in enumerate(prompts)]
            began = time.perf_counter()
            drawn = sampler.sample(asked, Decoding(1.0, 1.0, MAX_TOKENS))
            seconds = time.perf_counter() - began
    rows = [
        {"sample_id": f"{i:03}{j:029}", "prompt_token_ids": p, "token_ids": r.token_ids}
        for i, (p, responses) in enumerate(zip(prompts, drawn, strict=True)) for j, r in enumerate(responses)
    ]  # fmt: skip
    pl.DataFrame(rows).write_parquet(folder / f"{backend}.parquet")
    tokens = sum(len(r["token_ids"]) for r in rows)
    return {"start_s": started, "responses_per_s": len(rows) / seconds, "tokens_per_s": tokens / seconds,
            "peak_mb": peak.mb}  # fmt: skip


def responses(folder: Path, which: str) -> pl.DataFrame:
    """The responses to score, `which` is "short", "long prompt" or "long"."""
    torch.manual_seed(0)
    sampled = pl.read_parquet(folder / "transformers.parquet")
    if which == "short":
        return sampled
    if which == "long prompt":
        half = sampled[: len(sampled) // 2]
        more = torch.randint(1000, 40_000, (len(half) // N, LONG_PROMPT)).tolist()
        longer = [more[i // N] + p.to_list() for i, p in enumerate(half["prompt_token_ids"])]
        return half.with_columns(pl.Series("prompt_token_ids", longer))
    ids = torch.randint(1000, 40_000, (4, LONG)).tolist()
    return pl.DataFrame(
        {"sample_id": [f"{i:032}" for i in range(4)], "prompt_token_ids": [[1] * 32] * 4, "token_ids": ids}
    )


def score(folder: Path, variant: str, which: str) -> dict:
    """Score `responses` with a variant; speed and peak memory."""
    samples = responses(folder, which)
    with Peak(variant == "vLLM") as peak:
        if variant == "plain":
            seconds = plain(folder / "model", samples)
        else:
            engine = "vllm" if variant == "vLLM" else "transformers"
            with open_engine(make_run(folder, engine=engine), folder / "model") as rows_of:
                for _ in range(2):
                    began = time.perf_counter()
                    pl.concat(rows_of(samples))
                    seconds = time.perf_counter() - began
    tokens = int(samples["token_ids"].list.len().sum())
    return {"tokens": tokens, "tokens_per_s": tokens / seconds, "peak_mb": peak.mb}


@torch.inference_mode()
def plain(path: Path, samples: pl.DataFrame) -> float:
    """Seconds of the variant `plain`."""
    model, tokenizer = load_model(path, dtype="float32"), load_tokenizer(path)
    for _ in range(2):
        began = time.perf_counter()
        for batch in samples.iter_slices(8):
            p = pad(batch["prompt_token_ids"].to_list(), batch["token_ids"].to_list(), tokenizer.pad_token_id or 0)
            logits = model(input_ids=p.ids, attention_mask=p.mask, use_cache=False).logits.float()
            logits.log_softmax(-1).topk(TOP, -1)
        seconds = time.perf_counter() - began
    return seconds


class Peak:
    """Measures the peak resident memory in MB: of this process, or of all its children together, such as a server."""

    def __init__(self, of_children: bool):
        self.of_children = of_children

    def __enter__(self) -> Peak:
        self.mb, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self.of_children and not self._end.wait(0.1):
            family = psutil.Process().children(recursive=True)
            self.mb = max(self.mb, sum(_rss(p) for p in family) >> 20)

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()
        if not self.of_children:
            own = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
            self.mb = int(own.split()[1]) >> 10


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder that keeps the converted model between runs")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--dry", action="store_true", help="print the results, write no files")
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.stage:
        what, *rest = args.stage
        print(json.dumps({"sample": sample, "score": score}[what](args.folder, *rest)))
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.symlink(smollm2((args.model or folder / "converted").resolve()), folder / "model")

        def stage(*what: str) -> dict:
            options = ["--folder", str(folder), "--threads", str(args.threads)]
            command = [sys.executable, __file__, *options, "--stage", *what]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(*what, found, flush=True)
            return found

        sampled = [{"backend": b} | stage("sample", b) for b in ("transformers", "vllm")]
        scored = [
            {"responses": which, "variant": v} | stage("score", v, which)
            for which in ("short", "long prompt", "long") for v in ("project", "plain", "vLLM")
        ]  # fmt: skip
    if args.dry:
        return
    about = report.machine()
    about["versions"]["vllm"] = Profile.model_fields["vllm"].default.version
    report.write("sampling", sampled, report.table(
        ["backend", "start, s", "responses/s", "tokens/s", "peak, MB"],
        [[r["backend"], f"{r['start_s']:.0f}", f"{r['responses_per_s']:.1f}", f"{r['tokens_per_s']:.0f}", r["peak_mb"]]
         for r in sampled]), about)  # fmt: skip
    speed = {(r["responses"], r["variant"]): r["tokens_per_s"] for r in scored}
    for r in scored:
        r["times_vllm"] = r["tokens_per_s"] / speed[r["responses"], "vLLM"]
    report.write("scoring", scored, report.table(
        ["responses", "variant", "tokens/s", "times vLLM's", "peak, MB"],
        [[r["responses"], r["variant"], f"{r['tokens_per_s']:.0f}", f"{r['times_vllm']:.1f}", r["peak_mb"]]
         for r in scored]), about)  # fmt: skip


if __name__ == "__main__":
    main()
