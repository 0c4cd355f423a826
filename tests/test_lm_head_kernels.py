"""The GPU kernels of the LM head, run by Triton's interpreter: on a CPU, with the same arithmetic."""

import os

import pytest
import torch
from test_lm_head import NARROW, SETTINGS, WIDE, fused, hidden_batch, whole, with_gradients
from test_losses import randn

from nbg_core.losses.logps import token_logps
from nbg_core.losses.settings import LossSettings
from nbg_core.modeling import lm_head_tiles

KINDS = [SETTINGS[0], SETTINGS[2], SETTINGS[3], SETTINGS[7]]
"""Sampled tail and bucket, each at temperature 1 and at another: what the kernels do depends on nothing else."""

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU compiles them: see test_cuda_equals_float64"
)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The LM head takes the kernels for tensors of a CPU, too."""
    monkeypatch.setattr(lm_head_tiles.lm_head_kernels, "BLOCK", 64)  # so that a row has several
    monkeypatch.setattr(lm_head_tiles, "_has_kernels", lambda hidden: True)


@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("s", KINDS, ids=str)
def test_kernels_equal_float64(s, tile_bytes):
    batch = hidden_batch(hidden=24, vocab=150, padded=158, temperature=s.temperature, dtype=torch.float32)
    (loss, sums, logps), gradients = with_gradients(fused, batch, s, tile_bytes)
    double = batch | {name: batch[name].double() for name in ("hidden", "weight")}
    (expected, expected_sums, logits), expected_gradients = with_gradients(whole, double, s)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(logps.double(), token_logps(logits, batch["token_ids"]).detach(), rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("s", KINDS, ids=str)
def test_only_the_whole_gradient_is_rounded(s, tile_bytes):
    batch = hidden_batch(hidden=24, vocab=150, padded=158, temperature=s.temperature, dtype=torch.bfloat16)
    _, gradients = with_gradients(fused, batch, s, tile_bytes)
    double = batch | {name: batch[name].double() for name in ("hidden", "weight")}
    _, expected = with_gradients(whole, double, s)
    for got, want in zip(gradients, expected, strict=True):
        assert float((got.double() - want).norm() / want.norm()) < 2**-8


def test_the_gradient_of_a_sure_token_is_not_lost_in_rounding():
    """By DPO alone it is g (1 - p) at the token, a small difference of two numbers that bf16 has as the same one."""
    s = LossSettings(w_pos=0.0, w_neg=0.0)
    batch = hidden_batch(hidden=24, vocab=150, padded=158, dtype=torch.bfloat16)
    batch["hidden"] = batch["weight"][batch["token_ids"]]  # its own token's row: p from 0.9 to almost 1
    _, gradients = with_gradients(fused, batch, s)
    double = batch | {name: batch[name].double() for name in ("hidden", "weight")}
    (_, _, logits), expected = with_gradients(whole, double, s)
    assert token_logps(logits, batch["token_ids"]).detach().median() > -0.001
    for got, want in zip(gradients, expected, strict=True):
        assert float((got.double() - want).norm() / want.norm()) < 2**-7


def test_log_z_of_any_row():
    z = torch.cat([randn(5, 300, seed=1), 1e4 + randn(1, 300, seed=2), -1e30 * torch.ones(1, 300).double()]).float()
    z[1, ::2] = -torch.inf
    z[2, 100:] = -torch.inf
    z[3, :299] = -torch.inf
    at_one, at_temperature = lm_head_tiles.lm_head_kernels.log_z(z, 0.7)
    torch.testing.assert_close(at_one.double(), z.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(at_temperature.double(), (z.double() / 0.7).logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(lm_head_tiles.lm_head_kernels.log_z(z, 1.0)[1], at_one)
