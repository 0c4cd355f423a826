"""Training on the joint loss: the program that the deepspeed launcher starts on every rank.

    deepspeed --num_accelerators N --no_local_rank --module nbg_core.training.train --request FILE

Rank 0 appends a line of metrics per optimizer step to `steps.jsonl`, states are saved every `save_every` steps, and
the model is written to `final`. Run again after a crash, it continues from the last intact state, with any number of
ranks, and ends with the same weights: bit for bit with the same number of ranks and threads, else up to rounding.
Before the first update the policy must equal the reference (margin 0, sigmoid loss log 2). Checking that on the first
batch costs nothing, and finds reference log-probs of another model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large CPU tensors on huge pages: fewer page faults
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on GPUs

import deepspeed  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from nbg_core.base.progress import Progress  # noqa: E402
from nbg_core.config.training import TrainingSettings  # noqa: E402
from nbg_core.losses.metrics import SUMMED, check_metrics  # noqa: E402
from nbg_core.modeling.forward import no_packing  # noqa: E402
from nbg_core.reference.drift import step_0_bound  # noqa: E402
from nbg_core.training import states  # noqa: E402
from nbg_core.training.data import PairBatch, TrainingSet, prefetch  # noqa: E402
from nbg_core.training.engine import backward, build_engine, full_weights, learning_rate, take_step  # noqa: E402
from nbg_core.training.plan import Plan, Step, micro_batches  # noqa: E402
from nbg_core.training.request import ASSET, TIED_TO_STDIN, TrainingError, TrainingRequest  # noqa: E402
from nbg_core.training.weights import write_model  # noqa: E402


def init_distributed() -> None:
    """Join the process group that the environment describes: NCCL on GPUs, gloo on CPUs."""
    if dist.is_initialized():
        return
    # On CPUs DeepSpeed would now compile a shared-memory all-reduce, which takes minutes and serves inference only.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed()


def be_deterministic() -> None:
    """Make the same work give the same numbers; on GPUs as far as torch can."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made at import


def train(request: TrainingRequest) -> None:
    """Train to the end and write `request.final`; every rank of the process group calls it.

    Raises TrainingError for data that does not fit, a policy that is not the reference, or a loss that is not finite;
    the states saved before are kept."""
    be_deterministic()
    if request.threads:
        torch.set_num_threads(max(1, request.threads // request.training.n_processes))
    init_distributed()
    engine, pad_id = build_engine(request)
    data = TrainingSet(request.rows_path, pad_id)
    plan = Plan(len(data), request.training)
    rate = learning_rate(request.training, len(plan))
    try:
        start = states.resume(engine, request.states)
        rank = dist.get_rank()
        if rank == 0:
            _truncate(request.steps_file, start)
            if start:
                print(f"{ASSET}: continuing after step {start} of {len(plan)}", flush=True)
            if request.training.compile:
                print(f"{ASSET}: the first steps compile the model's layers, which can take a minute", flush=True)
            if pad_id is not None:
                print(f"{ASSET}: {no_packing(engine.module.policy.config)}", flush=True)
        progress = Progress(ASSET, len(plan) - start, lambda line: print(line, flush=True))
        todo = range(start, len(plan))
        tasks = (partial(data.batch, pairs) for i in todo for pairs in _share(data, plan[i], request.training))
        with closing(prefetch(tasks)) as batches:
            for step in map(plan.__getitem__, todo):
                metrics = train_step(engine, data, step, request.training, rate(step.index), batches)
                if rank == 0:
                    with open(request.steps_file, "a") as f:
                        f.write(json.dumps({"step": step.index, **metrics}) + "\n")
                    progress.advance(1, f"loss {metrics['loss']:.4f}, margin {metrics['margin']:.4f}")
                if (step.index + 1) % request.training.save_every == 0 and step.index + 1 < len(plan):
                    states.save(engine, request.states, step.index + 1)
        weights = full_weights(engine)
        if rank == 0:
            policy = engine.module.policy
            write_model(policy, weights, request.policy_path, request.final, _card(request, data, len(plan)))
        dist.barrier()
    finally:
        engine.destroy()


def _share(data: TrainingSet, step: Step, settings: TrainingSettings) -> list[np.ndarray]:
    """This rank's micro-batches of a step."""
    return micro_batches(
        step.pairs, data.n_inputs, settings, dist.get_rank(), dist.get_world_size(), padded=data.pad_id is not None
    )


def train_step(
    engine: deepspeed.DeepSpeedEngine, data: TrainingSet, step: Step, settings: TrainingSettings, rate: float,
    batches: Iterator[PairBatch],
) -> dict[str, float]:  # fmt: skip
    """One optimizer step with learning rate `rate`. Its micro-batches on this rank are the next ones of `batches`.

    Returns the step's metrics: those before its update, over the global batch."""
    began, waited = time.monotonic(), 0.0
    denominators = data.denominators(step.pairs)
    shares = _share(data, step, settings)
    values, drifts = [], []
    for _ in shares:
        asked = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - asked
        batch = batch.to(engine.device)
        loss, sums, drift = engine(batch, denominators, with_drift=step.index == 0)
        values.append(torch.stack([loss.detach().double(), *(sums[metric.name] for metric in SUMMED)]))
        drifts.append(drift)
        backward(engine, loss)
    total = torch.stack(values).sum(0)
    dist.all_reduce(total)
    totals: list[float] = total.tolist()
    if not all(map(math.isfinite, totals)):
        _stop_not_finite(step, data, shares, values)
    if step.index == 0:
        _check_drift(data, shares, drifts, settings)
    norm = take_step(engine, settings, rate)
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient of step {step.index} is not finite, pairs {_names(data, step.pairs)}; "
            "lower training.learning_rate, or take these pairs out"
        )
    metrics = {"loss": totals[0]}
    for metric, value in zip(SUMMED, totals[1:], strict=True):
        assert metric.mean_over is not None  # a metric with a sum has one
        metrics[metric.name] = value / getattr(denominators, metric.mean_over)
    seconds = time.monotonic() - began
    metrics |= {
        "grad_norm": norm, "learning_rate": rate, "tokens_per_second": int(data.n_inputs[step.pairs].sum()) / seconds,
        "data_wait": waited / seconds,
    }  # fmt: skip
    check_metrics(metrics)
    return metrics


def _check_drift(
    data: TrainingSet, shares: list[np.ndarray], drifts: list[torch.Tensor], settings: TrainingSettings
) -> None:
    """Raise on all ranks when a response of the first batch has another log-prob than its reference row."""
    pairs = np.concatenate(shares)
    reward = settings.loss.beta * torch.cat(drifts).abs().cpu().numpy()  # [2B] of this rank's B pairs
    bound = step_0_bound(settings.precision, settings.loss.beta, data.n_tokens[pairs].ravel())
    worst = (0.0, 0.0, 0.0, "")
    if len(reward):
        at = int((reward / bound).argmax())
        worst = (float(reward[at] / bound[at]), float(reward[at]), float(bound[at]), data.pair_id(pairs[at // 2]))
    found: list = [worst] * dist.get_world_size()
    dist.all_gather_object(found, worst)
    ratio, value, allowed, pair = max(found)
    if ratio > 1:
        raise TrainingError(
            f"before the first update the policy must equal its reference, but the implicit reward of pair {pair} is "
            f"off by {value:.3g} (allowed {allowed:.3g}). Either the reference_logprobs rows are not of this policy: "
            "delete them and materialise reference_logprobs again (docs/operations.md, Making one partition again); or "
            "training computes other numbers than scoring: compare dtype, attention and torch of the two"
        )


def _stop_not_finite(step: Step, data: TrainingSet, shares: list[np.ndarray], values: list[torch.Tensor]) -> None:
    """Raise on all ranks, naming the pairs of the micro-batches whose loss is not finite."""
    mine = [p for share, v in zip(shares, values, strict=True) if not torch.isfinite(v).all() for p in share.tolist()]
    found: list = [[]] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    pairs = list(dict.fromkeys(p for part in found for p in part))
    raise TrainingError(
        f"the loss of step {step.index} is not finite, in pairs {_names(data, pairs)}; lower training.learning_rate or "
        "training.loss.beta, and check the teacher rows of these pairs; the states saved before are kept"
    )


def _names(data: TrainingSet, pairs) -> str:
    names = ", ".join(data.pair_id(p) for p in pairs[:8])
    return names + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")


def _truncate(steps_file: Path, start: int) -> None:
    """Keep only the metrics of the steps before `start`: a crash may have left later ones, or half a line."""
    lines = steps_file.read_text().splitlines()[:start] if steps_file.exists() else []
    temporary = steps_file.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines))
    temporary.rename(steps_file)


def _card(request: TrainingRequest, data: TrainingSet, n_steps: int) -> dict:
    return {
        "training_id": request.training_id,
        "parent_model_id": request.policy_id,
        "teacher_model_id": request.teacher_id,
        "teacher_storage_id": request.storage_id,
        "input_snapshot": request.snapshot,
        "n_pairs": len(data),
        "n_steps": n_steps,
        "training": request.training.model_dump(mode="json"),
    }


def _end_with_the_worker() -> None:
    """Exit as soon as stdin closes: nobody is left to take the result, and the next run wants this work folder."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--request", type=Path, required=True)
    request = TrainingRequest.model_validate_json(parser.parse_args().request.read_text())
    if os.environ.get(TIED_TO_STDIN):
        _end_with_the_worker()
    try:
        train(request)
    except Exception as e:  # the worker reports it in one sentence; the log has the traceback
        traceback.print_exc()
        try:
            with open(request.error_file, "x") as f:  # the first rank's: the others fail because it does
                json.dump({"error": str(e) or type(e).__name__, "error_type": type(e).__name__}, f)
        except FileExistsError:
            pass
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
