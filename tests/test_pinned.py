"""Batches are in page-locked memory where there is a GPU. Copies to a real GPU are not tried here."""

import numpy as np
import torch
from torch import Tensor

from nbg_core.losses.targets import TeacherTargets
from nbg_core.modeling.forward import collate
from nbg_core.training.data import PairBatch


def batch(pad_id: int | None) -> PairBatch:
    n = torch.arange(5)
    responses = [np.array([3, 4, 5]), np.array([6, 7])]
    targets = TeacherTargets(n[:, None], n[:, None].float(), n[:, None] < 3, n[:, None] >= 3, n.float())
    return PairBatch(collate([[1, 2]] * 2, responses, pad_id), n, n // 3, n < 3, n.float(), targets, 1)


def tensors(x: object) -> list[Tensor]:
    values = [*vars(x).values()]
    return [v for v in values if isinstance(v, Tensor)] + [
        t for v in values if hasattr(v, "__dataclass_fields__") for t in tensors(v)
    ]


def test_every_tensor_of_a_batch_is_pinned(monkeypatch):
    for pad_id in (None, 0):
        plain, pinned = batch(pad_id), set()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(Tensor, "pin_memory", lambda t, to=pinned: to.add(c := t.clone()) or c)
        made = plain.pin()
        assert {id(t) for t in tensors(made)} == {id(t) for t in pinned} and len(pinned) >= 12
        assert all(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(made), strict=True))
        assert made.n_pairs == plain.n_pairs and type(made.inputs) is type(plain.inputs)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert plain.pin() is plain
        assert all(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(plain.to("cpu")), strict=True))
