"""The gradient that a set of ranks comes to, by what it does to the weights: `python -m rank_gradients REQUEST...`.

An optimizer that subtracts the gradient takes AdamW's place; engine, reduction over ranks and step are the real ones.
So the gradient is seen whole, at every ZeRO stage, without DeepSpeed's own ways to read it.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.optim import SGD

from nbg_core.training import engine as engines
from nbg_core.training.data import TrainingSet
from nbg_core.training.plan import Plan, micro_batches
from nbg_core.training.request import TrainingRequest
from nbg_core.training.train import init_distributed, train_step

STEP = 1
"""Step 0 would ask that the policy is the reference."""


def gradients(request: TrainingRequest) -> dict[str, torch.Tensor]:
    """Of optimizer step STEP, taken first, by parameter; on rank 0."""
    engine, pad_id = engines.build_engine(request)
    data = TrainingSet(request.rows_path, pad_id)
    step = Plan(len(data), request.training)[STEP]
    before = engines.full_weights(engine)
    shares = micro_batches(step.pairs, data.n_inputs, request.training, dist.get_rank(), dist.get_world_size())
    train_step(engine, data, step, request.training, 1.0, iter([data.batch(pairs) for pairs in shares]))
    after = engines.full_weights(engine)
    engine.destroy()
    return {name: before[name].double() - after[name].double() for name in before}


if __name__ == "__main__":
    init_distributed()
    engines.AdamW = lambda parameters, **_: SGD(parameters, lr=1.0)
    for file in sys.argv[1:]:
        request = TrainingRequest.model_validate_json(Path(file).read_text())
        found = gradients(request)
        if dist.get_rank() == 0:
            save_file({n: g.contiguous() for n, g in found.items()}, request.work / "gradients.safetensors")
