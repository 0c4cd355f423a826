"""Four ranks that share the tokens of a pack against one process that has them all, naively, in float64."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_packing import VOCAB, make, plain_hidden

from nbg_core.losses.joint import Denominators, joint_loss
from nbg_core.losses.settings import LossSettings
from nbg_core.losses.targets import TeacherTargets
from nbg_core.modeling.forward import output_matrix
from nbg_core.modeling.lm_head import lm_head_joint_loss
from nbg_core.modeling.packing import MODEL_TYPES, pack, packed_hidden
from nbg_core.modeling.sequence_parallel import check_heads, share

RANKS = 4
PAIRS = {
    "long and short": [(9, [47, 62]), (1, [6, 3]), (20, [1, 2])],
    "fewer tokens than ranks": [(1, [1, 2])],
    "nothing": [],
}


def batch(lengths) -> tuple:
    """Prompts, responses, and the arguments of the joint loss that are not the model's."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, p) for p, _ in lengths]
    responses = [[rng.integers(0, VOCAB, r) for r in both] for _, both in lengths]
    n = [len(r) for both in responses for r in both]
    side = torch.arange(len(n)).repeat_interleave(torch.tensor(n, dtype=torch.long))
    tokens = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(r for both in responses for r in both)]))
    total, k = len(tokens), 6
    ids = torch.from_numpy(np.stack([rng.permutation(VOCAB)[:k] for _ in range(total)] or [np.zeros(k, int)])[:total])
    top = (torch.arange(k) < 4).expand(total, k)
    logp = torch.from_numpy(rng.normal(-3, 0.5, (total, k)).astype(np.float32))
    targets = TeacherTargets(ids, logp, top, ~top, torch.full((total,), -1.5))
    reference = torch.from_numpy(rng.normal(-4, 1, total).astype(np.float32))
    return prompts, responses, [tokens, side // 2, side % 2 == 0, reference, targets]


def take(arrays: list, rows: slice) -> list:
    return [a.take(rows) if isinstance(a, TeacherTargets) else a[rows] for a in arrays]


SETTINGS = {
    "sampled tail": LossSettings(nll_coef=0.3),
    "bucket": LossSettings(estimator="bucket", divergence="jsd", dpo_variant="sigmoid_norm", temperature=1.5),
}


def differences(group: dist.ProcessGroup) -> list[str]:
    """On every rank: the cases in which the ranks' loss, sums or gradients together are not those of one process."""
    wrong = []
    for architecture in MODEL_TYPES:
        model = make(architecture)
        weight = output_matrix(model)
        for name, lengths in PAIRS.items():
            for kind, settings in SETTINGS.items():
                prompts, responses, arrays = batch(lengths)
                how = dict(settings=settings, denominators=Denominators(5, 40, 40))
                model.zero_grad()
                hidden = packed_hidden(model, pack(prompts, responses), group)
                mine = take(arrays, share(len(arrays[0]), group))
                # Tiles of 16 rows, the least: a rank has two of them in the longest case.
                loss, sums, _ = lm_head_joint_loss(
                    hidden, weight, *mine, len(lengths), vocab=VOCAB, tile_bytes=1, group=group, **how
                )
                loss.backward()
                got = {"loss": loss.detach(), **sums} | {n: p.grad for n, p in model.named_parameters()}
                got = {n: torch.zeros(()) if g is None else g for n, g in got.items()}
                for tensor in got.values():
                    dist.all_reduce(tensor)
                if not lengths:
                    wrong += [f"{architecture} {name}: {n}" for n, g in got.items() if g.count_nonzero()]
                    continue
                model.zero_grad()
                logits = plain_hidden(model, prompts, responses) @ weight.T
                loss, sums = joint_loss(logits, *arrays, len(lengths), **how)
                loss.backward()
                expected = {"loss": loss.detach(), **sums} | {n: p.grad for n, p in model.named_parameters()}
                for n, e in expected.items():
                    if not torch.allclose(got[n], e, rtol=1e-9, atol=1e-11 * (1 + float(e.abs().max()))):
                        wrong.append(f"{architecture}, {name}, {kind}: {n} is off by {float((got[n] - e).abs().max())}")
    return wrong


def saved_bytes(forward) -> int:
    """What autograd keeps of a forward pass for the backward pass, parameters included."""
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = forward()  # alive while storages are told apart by their address
    assert out.requires_grad
    return sum(kept.values())


def activations(group: dist.ProcessGroup) -> list[int]:
    """Bytes that a forward pass of a long pair keeps: of one process, and of this rank."""
    model = make("llama")
    prompts, responses, _ = batch([(1000, [2000, 2000])])
    parameters = sum(p.nbytes for p in model.parameters())
    layout = pack(prompts, responses)
    return [saved_bytes(lambda g=g: packed_hidden(model, layout, g)) - parameters for g in (None, group)]


def on_rank(rank: int, folder: Path) -> tuple[list[str], list[int]]:
    torch.set_num_threads(1)
    where = dict(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120), **where)
    group = dist.new_subgroups(RANKS)[0]
    found = differences(group), activations(group)
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with ProcessPoolExecutor(RANKS, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(on_rank, range(RANKS), [folder] * RANKS))


def test_loss_and_every_gradient_of_ranks_that_share_tokens_are_those_of_one_process(ranks):
    assert [wrong for wrong, _ in ranks] == [[]] * RANKS


def test_a_rank_keeps_its_share_of_the_activations(ranks):
    for _, (whole, share_of_it) in ranks:
        assert 0.2 * whole < share_of_it < 0.35 * whole, (whole, share_of_it)


@pytest.mark.parametrize("heads, key_heads, size", [(4, 2, 2), (4, 2, 4), (9, 3, 3), (8, 1, 8)])
def test_heads_that_can_be_shared_out(heads, key_heads, size):
    check_heads(heads, key_heads, size)


@pytest.mark.parametrize("heads, key_heads, size", [(9, 3, 2), (8, 3, 4), (4, 2, 8)])
def test_heads_that_cannot_be_shared_out_are_named(heads, key_heads, size):
    with pytest.raises(
        ValueError, match=f"sequence_parallel={size}: {heads} attention heads and {key_heads} key heads"
    ):
        check_heads(heads, key_heads, size)
