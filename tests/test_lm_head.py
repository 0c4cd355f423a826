"""nbg_core.modeling.lm_head against `joint_loss` of the whole logits, which test_losses holds against naive references,
and against
such a reference itself; gradients also against finite differences.

Shapes: T tokens, H hidden, V vocabulary, K stored entries, B pairs.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import counts, make_batch, make_targets, randn, ref_joint, replace, take_rows, top_ids
from torch.utils._python_dispatch import TorchDispatchMode

from nbg_core.losses.dpo import DPO_VARIANTS
from nbg_core.losses.joint import Denominators, joint_loss
from nbg_core.losses.logps import token_logps
from nbg_core.losses.settings import LossSettings
from nbg_core.losses.targets import TeacherTargets
from nbg_core.modeling import lm_head
from nbg_core.modeling.lm_head import lm_head_joint_loss, lm_head_logps
from nbg_core.modeling.lm_head_tiles import MIN_ROWS

WIDE, NARROW = 1 << 20, 1
"""Tile bytes: all rows at once; 16 rows, the least."""
LENGTHS = ((3, 2), (12, 9), (1, 4), (30, 25), (2, 1))
"""Response tokens; with a narrow tile the second and fourth pair do not fit, the others are alone or together."""
SETTINGS = [
    LossSettings(),
    LossSettings(temperature=2.0, w_neg=0.5),
    LossSettings(temperature=0.7, scale_by_temperature_squared=False, w_pos=0.0),
    *(LossSettings(estimator="bucket", divergence=d) for d in ("forward", "reverse", "jsd")),
    *(LossSettings(estimator="bucket", divergence=d, temperature=1.5, jsd_alpha=0.3) for d in ("reverse", "jsd")),
    *(LossSettings(dpo_variant=v, beta=0.7, nll_coef=0.3) for v in DPO_VARIANTS),
    LossSettings(label_smoothing=0.2, beta=0.5),
    LossSettings(w_dpo=0.0), LossSettings(w_dpo=0.0, w_neg=0.0, estimator="bucket"),
    LossSettings(w_dpo=0.0, w_pos=0.0, w_neg=0.0), LossSettings(w_dpo=0.0, w_pos=0.0, w_neg=0.0, nll_coef=1.0),
]  # fmt: skip
BELOW_ONE = LossSettings(estimator="bucket", temperature=0.5)


def hidden_batch(lengths=LENGTHS, vocab=11, hidden=5, padded=13, seed=0, k=4, temperature=1.0, dtype=torch.float64):
    """A batch with hidden [T, H] and weight [padded, H] in place of logits; each row has k top ids, 3 tail samples."""
    batch = make_batch(lengths, vocab, seed, k, temperature)
    teacher, n = batch.pop("teacher"), len(batch.pop("logits"))
    top = top_ids(teacher, k)
    rest = [[v for v in range(vocab) if v not in t][:2] for t in top]
    tail = [[*r, r[0]] if r and i % 3 else [] for i, r in enumerate(rest)]  # an id twice; some rows without samples
    targets = make_targets(teacher, top, tail, temperature=temperature, width=k + 4)
    h, w = randn(n, hidden, seed=seed + 5, scale=1.0).to(dtype), randn(padded, hidden, seed=seed + 6, scale=1.0)
    return batch | {"targets": targets, "hidden": h, "weight": w.to(dtype), "vocab": vocab}


def rows_of(batch, rows):
    return batch | take_rows({k: v for k, v in batch.items() if k != "weight"}, rows)


def fused(batch, s, tile_bytes=WIDE, **changes):
    return lm_head_joint_loss(
        **(batch | changes), settings=s, denominators=Denominators(3, 20, 30), tile_bytes=tile_bytes
    )


def whole(batch, s, **changes):
    arguments = batch | changes
    hidden, weight, vocab = (arguments.pop(name) for name in ("hidden", "weight", "vocab"))
    logits = (hidden @ weight.t())[:, :vocab]
    return *joint_loss(logits, **arguments, settings=s, denominators=Denominators(3, 20, 30)), logits


def with_gradients(function, batch, s, *args, incoming=1.0):
    """Results of a loss function and its gradients by hidden and weight."""
    leaves = {name: batch[name].clone().requires_grad_(True) for name in ("hidden", "weight")}
    results = function(batch, s, *args, **leaves)
    (results[0] * incoming).backward()
    return results, [leaf.grad for leaf in leaves.values()]


def assert_same(batch, s, tile_bytes, rtol=1e-9, atol=1e-11, incoming=1.0):
    (loss, sums, logps), gradients = with_gradients(fused, batch, s, tile_bytes, incoming=incoming)
    (expected, expected_sums, logits), expected_gradients = with_gradients(whole, batch, s, incoming=incoming)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(sums, expected_sums, rtol=rtol, atol=atol)
    torch.testing.assert_close(logps, token_logps(logits, batch["token_ids"]).detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(gradients, expected_gradients, rtol=rtol, atol=atol)
    assert all(g.isfinite().all() for g in gradients) and loss.isfinite()
    assert not gradients[1][batch["vocab"] :].any() and not logps.requires_grad


@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("s", SETTINGS, ids=range(len(SETTINGS)))
def test_it_is_the_joint_loss_of_the_logits(s, tile_bytes):
    assert_same(hidden_batch(temperature=s.temperature), s, tile_bytes, incoming=-2.5)


@pytest.mark.parametrize("s", SETTINGS[3:8], ids=lambda s: f"{s.divergence}-{s.temperature}")
@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_is_the_naive_reference_when_the_head_is_the_whole_vocabulary(s, tile_bytes):
    batch = make_batch(LENGTHS[:3], k=7, temperature=s.temperature)
    logits = batch["logits"]
    weight = torch.eye(7, dtype=torch.float64)  # logits as hidden states
    arguments = {k: v for k, v in batch.items() if k not in ("teacher", "logits")}
    for settings_ in (s, LossSettings(temperature=s.temperature)):
        loss, _, _ = lm_head_joint_loss(
            logits, weight, **arguments, vocab=7, settings=settings_, denominators=counts(batch), tile_bytes=tile_bytes
        )
        assert loss.item() == pytest.approx(ref_joint(batch, settings_, counts(batch)), rel=1e-9)


class Again(torch.autograd.Function):
    """The loss anew for every backward: gradcheck asks for gradients more than once."""

    @staticmethod
    def forward(ctx, hidden, weight, function):
        ctx.save_for_backward(hidden, weight)
        ctx.function = function
        return function(hidden, weight).detach()

    @staticmethod
    def backward(ctx, incoming):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(True) for x in ctx.saved_tensors]
            return *torch.autograd.grad(ctx.function(*leaves), leaves, incoming), None


@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("s", [SETTINGS[1], *SETTINGS[3:8], SETTINGS[8]], ids=range(7))
def test_gradcheck(s, tile_bytes):
    batch = hidden_batch(((2, 1), (9, 10)), vocab=6, hidden=3, padded=7, k=3, temperature=s.temperature)
    leaves = [batch[name].requires_grad_(True) for name in ("hidden", "weight")]
    assert torch.autograd.gradcheck(
        lambda *x: Again.apply(*x, lambda h, w: fused(batch, s, tile_bytes, hidden=h, weight=w)[0]), leaves
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=4),
    vocab=st.integers(2, 40), hidden=st.integers(1, 9), padding=st.integers(0, 3), k=st.integers(1, 40),
    rows=st.integers(1, 60), s=st.sampled_from(SETTINGS), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_tile(lengths, vocab, hidden, padding, k, rows, s, seed):
    batch = hidden_batch(lengths, vocab, hidden, vocab + padding, seed, min(k, vocab), s.temperature)
    assert_same(batch, s, rows * vocab * 8)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=4),
    vocab=st.integers(60, 300), hidden=st.integers(1, 9), rows=st.integers(1, 60),
    s=st.sampled_from([s for s in SETTINGS if s.dpo_variant in ("sigmoid", "sigmoid_norm")]), seed=st.integers(0, 99),
)  # fmt: skip
def test_float32_is_right_to_rounding_in_any_block_of_the_weight(lengths, vocab, hidden, rows, s, seed):
    batch = hidden_batch(lengths, vocab, hidden, vocab + 2, seed, 8, s.temperature, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nbg_core.modeling.lm_head_tiles.WEIGHT_BLOCK_BYTES", 1)
        (loss, sums, logps), gradients = with_gradients(fused, batch, s, rows * vocab * 4)
    double = batch | {name: batch[name].double() for name in ("hidden", "weight")}
    (expected, expected_sums, logits), expected_gradients = with_gradients(whole, double, s)
    assert loss.dtype == logps.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=2e-4)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * (1 + float(want.abs().max())))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3),
    vocab=st.sampled_from([7, 97, 129, 1500]), hidden=st.sampled_from([8, 64, 1024]), seed=st.integers(0, 99),
    rows=st.tuples(st.integers(1, 400), st.integers(1, 400)), data=st.data(),
)  # fmt: skip
def test_equal_rows_have_equal_logps_whatever_is_beside_them(lengths, vocab, hidden, seed, rows, data):
    n = sum(map(sum, lengths))
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(n, hidden, generator=g), torch.randn(vocab + 1, hidden, generator=g)
    ids = torch.randint(vocab, (n,), generator=g)
    pair = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor([sum(x) for x in lengths]))
    none = torch.zeros(n, 1, dtype=torch.bool)
    targets = TeacherTargets(ids[:, None], torch.zeros(n, 1), ~none, none, torch.full((n,), -math.inf))
    s = data.draw(st.sampled_from(SETTINGS[:5]))
    batch = {
        "hidden": h, "weight": w.requires_grad_(True), "token_ids": ids, "pair_index": pair, "is_chosen": ids % 2 == 0,
        "reference_logps": torch.zeros(n), "targets": targets, "n_pairs": len(lengths), "vocab": vocab,
    }  # fmt: skip
    block_bytes = data.draw(st.sampled_from([1, 64 * 1024, 1 << 23]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nbg_core.modeling.lm_head_tiles.WEIGHT_BLOCK_BYTES", block_bytes)
        one, two = (fused(batch, s, r * vocab * 4)[2] for r in rows)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    some = lm_head_logps(h[start:stop], w, ids[start:stop], vocab=vocab)
    assert torch.equal(one, two) and torch.equal(one[start:stop], some)


@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("s", [SETTINGS[0], SETTINGS[3], SETTINGS[7]], ids=str)
def test_with_the_rows_of_pairs_known_no_value_of_a_tensor_is_waited_for(monkeypatch, s, tile_bytes):
    """On a GPU, reading a value on the CPU waits for all work before it, in every micro-batch."""
    batch = hidden_batch(temperature=s.temperature)
    expected = fused(batch, s, tile_bytes)
    pair_rows = [c + r for c, r in LENGTHS]

    def read(self, *args):
        raise AssertionError("a value was read")

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, read)
    found = fused(batch, s, tile_bytes, pair_rows=pair_rows)
    monkeypatch.undo()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])


@given(st.lists(st.integers(1, 9), max_size=7), st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_chunks_are_whole_pairs_the_fewest_and_of_these_the_most_even(lengths, rows):
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    assert lm_head._rows_of_pairs(index) == lengths
    got = [c.stop - c.start for c in lm_head._chunks(lengths, rows)]

    def ways(rest: list[int]) -> list[list[int]]:
        """All sums of consecutive lengths that fit, or are of one that does not."""
        if not rest:
            return [[]]
        first = [i for i in range(1, len(rest) + 1) if i == 1 or sum(rest[:i]) <= rows]
        return [[sum(rest[:i]), *more] for i in first for more in ways(rest[i:])]

    everything = ways(lengths)
    fewest = min(map(len, everything))
    assert got in everything and len(got) == fewest
    longest = [max((n for n in way if n <= rows), default=0) for way in everything if len(way) == fewest]
    assert max((n for n in got if n <= rows), default=0) == min(longest)


@pytest.mark.parametrize("variant", ["sigmoid", "sigmoid_norm"])
@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_policy_that_is_the_reference_has_a_dpo_loss_of_exactly_log_2(variant, tile_bytes):
    batch = hidden_batch(vocab=300, padded=320, hidden=64, dtype=torch.float32)
    some = [lm_head_logps(batch["hidden"][i : i + 7], batch["weight"], batch["token_ids"][i : i + 7], vocab=300)
            for i in range(0, len(batch["hidden"]), 7)]  # fmt: skip
    _, sums, _ = fused(batch, LossSettings(dpo_variant=variant), tile_bytes, reference_logps=torch.cat(some))
    assert sums["dpo"].item() == pytest.approx(5 * math.log(2), rel=1e-15) and sums["margin"].item() == 0


def test_rows_in_any_order_of_pairs():
    batch = hidden_batch()
    n = len(batch["hidden"])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    mixed = rows_of(batch, order)
    for tile_bytes in (WIDE, NARROW):
        assert_same(mixed, LossSettings(), tile_bytes)
    torch.testing.assert_close(fused(mixed, LossSettings())[0], fused(batch, LossSettings())[0])


@pytest.mark.parametrize("s", [SETTINGS[0], SETTINGS[3], SETTINGS[8], SETTINGS[15]], ids=range(4))
def test_an_empty_micro_batch_is_a_differentiable_zero(s):
    batch = hidden_batch()
    empty = rows_of(batch, slice(0, 0)) | {"n_pairs": 0}
    (loss, sums, logps), gradients = with_gradients(fused, empty, s)
    assert loss.item() == 0 and not any(v.item() for v in sums.values()) and logps.shape == (0,)
    assert gradients[0].shape == (0, 5) and torch.equal(gradients[1], torch.zeros(13, 5, dtype=torch.float64))
    assert lm_head_logps(empty["hidden"], empty["weight"], empty["token_ids"], vocab=11).shape == (0,)


def test_only_what_requires_a_gradient_gets_one():
    batch = hidden_batch()
    _, expected = with_gradients(fused, batch, LossSettings())
    for name, gradient in zip(("hidden", "weight"), expected, strict=True):
        leaf = batch[name].clone().requires_grad_(True)
        fused(batch, LossSettings(), **{name: leaf})[0].backward()
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-14)
    assert not fused(batch, LossSettings())[0].requires_grad
    with torch.no_grad():
        assert not fused(batch, LossSettings(), weight=leaf)[0].requires_grad


def test_a_second_backward_is_refused():
    batch = hidden_batch()
    loss, _, _ = fused(batch, LossSettings(), weight=batch["weight"].requires_grad_(True))
    loss.backward()
    with pytest.raises(RuntimeError, match="call lm_head_joint_loss again"):
        loss.backward()


# --- extremes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [SETTINGS[0], SETTINGS[1], *SETTINGS[3:8], BELOW_ONE], ids=range(8))
@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("scale", [0.0, 30.0, 3e3])
def test_ties_one_hot_teachers_and_mass_that_underflows(s, tile_bytes, k, scale):
    """float32; logits 0 (all tied), or hundreds to thousands of nats apart; k = 8 is the whole vocabulary."""
    batch = hidden_batch(((9, 8), (9, 12)), vocab=8, hidden=4, padded=8, k=k, dtype=torch.float32)
    targets = batch["targets"]
    one_hot = torch.full_like(targets.logprobs, -torch.inf)
    one_hot[:, 0] = 0
    targets = TeacherTargets(
        targets.ids, one_hot.float(), targets.is_top, targets.is_tail, torch.full((38,), -1e3 if k == 3 else -20.0)
    )
    hidden = batch["hidden"] * scale
    assert_same(batch | {"hidden": hidden, "targets": targets}, s, tile_bytes, rtol=1e-4, atol=1e-3 * (scale or 1e-3))


@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("s", SETTINGS[3:8], ids=range(5))
def test_a_head_of_the_whole_vocabulary_may_have_logits_of_any_level(s, tile_bytes):
    batch = hidden_batch(vocab=7, hidden=7, padded=7, k=7, temperature=s.temperature, dtype=torch.float32)
    batch["weight"] = torch.eye(7)  # logits as hidden states
    (loss, _, _), (expected, _) = with_gradients(fused, batch, s, tile_bytes)
    (shifted, _, _), (got, _) = with_gradients(fused, batch | {"hidden": batch["hidden"] - 1024}, s, tile_bytes)
    torch.testing.assert_close(shifted, loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_gradient_of_a_tail_too_small_for_float32_keeps_its_shape(tile_bytes):
    """The student's tail is e^-200 in all; forward KL still moves each tail logit by its share of the teacher's."""
    weight = torch.tensor([[200.0], [0.0], [1.0]]).requires_grad_(True)
    row = {
        "hidden": torch.ones(40, 1), "token_ids": torch.zeros(40, dtype=torch.long), "n_pairs": 1, "vocab": 3,
        "pair_index": torch.zeros(40, dtype=torch.long), "is_chosen": torch.arange(40) < 20,
        "reference_logps": torch.zeros(40), "targets": make_targets(torch.tensor([[0.0, 0, 0]] * 40), [[0]] * 40),
    }  # fmt: skip
    loss, _, _ = fused(row, LossSettings(w_dpo=0, w_neg=0, estimator="bucket"), tile_bytes, weight=weight)
    loss.backward()
    share = torch.tensor([1.0, math.e]) / (1 + math.e)
    torch.testing.assert_close(weight.grad[:, 0], torch.cat([torch.tensor([2 / 3]), -2 / 3 * share]))


@pytest.mark.parametrize("s", [LossSettings(w_pos=0.0), LossSettings(w_pos=0.0, estimator="bucket")], ids=range(2))
def test_a_side_of_weight_0_spreads_no_nan(s):
    batch = hidden_batch()
    side = batch["is_chosen"]
    dirty = replace(batch["targets"], logprobs=batch["targets"].logprobs.masked_fill(side[:, None], math.nan))
    clean_results, clean = with_gradients(fused, batch, s)
    (loss, sums, _), gradients = with_gradients(fused, batch | {"targets": dirty}, s)
    assert torch.equal(loss, clean_results[0]) and all(map(torch.equal, gradients, clean)) and sums["kl_chosen"].isnan()


# --- low precision and memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [SETTINGS[0], SETTINGS[4]], ids=["sampled_tail", "bucket"])
@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
def test_bf16_is_computed_in_float32(s, tile_bytes, monkeypatch):
    monkeypatch.setattr("nbg_core.modeling.lm_head_tiles.WEIGHT_BLOCK_BYTES", 1)  # blocks of 50 rows
    batch = hidden_batch(hidden=24, vocab=150, padded=158, dtype=torch.bfloat16)
    (loss, sums, logps), gradients = with_gradients(fused, batch, s, tile_bytes)
    double = batch | {name: batch[name].double() for name in ("hidden", "weight")}
    (expected, expected_sums, logits), expected_gradients = with_gradients(whole, double, s)
    assert loss.dtype == logps.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in gradients)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(logps.double(), token_logps(logits, batch["token_ids"]).detach(), rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):  # rounded once, at the end
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)], ids=["bf16", "fp32"])
@pytest.mark.parametrize("s", SETTINGS[:8], ids=str)
@pytest.mark.parametrize("tile_bytes", [WIDE, NARROW], ids=["wide", "narrow"])
def test_cuda_equals_float64(s, tile_bytes, dtype, bound):
    batch = hidden_batch(hidden=24, vocab=150, padded=158, temperature=s.temperature, dtype=dtype)
    there = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    there["targets"] = TeacherTargets(**{name: value.cuda() for name, value in vars(batch["targets"]).items()})
    (loss, _, logps), gradients = with_gradients(fused, there, s, tile_bytes)
    double = batch | {name: batch[name].double() for name in ("hidden", "weight")}
    (expected, _, logits), expected_gradients = with_gradients(whole, double, s)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-4, atol=1e-4)
    expected_logps = token_logps(logits, batch["token_ids"]).detach()
    torch.testing.assert_close(logps.double().cpu(), expected_logps, rtol=1e-4, atol=1e-4)
    for got, want in zip(gradients, expected_gradients, strict=True):
        assert (got.double().cpu() - want).norm() <= bound * want.norm()


class Largest(TorchDispatchMode):
    """Numel of the largest storage that any operation returned, of shape other than the weight's."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.bytes = weight, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() != self.weight.untyped_storage().nbytes():
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("s", [SETTINGS[0], SETTINGS[1], SETTINGS[7]], ids=["sampled_tail", "temperature", "bucket"])
def test_no_tensor_is_larger_than_the_tile(s):
    batch = hidden_batch(((40, 30), (20, 10), (60, 60)), vocab=3000, padded=3001, hidden=4, k=3, dtype=torch.float32)
    bound = 20 * 3000 * 4
    weight = batch["weight"].requires_grad_(True)
    with Largest(weight) as largest:
        fused(batch, s, bound, weight=weight, hidden=batch["hidden"].requires_grad_(True))[0].backward()
        lm_head_logps(batch["hidden"], weight, batch["token_ids"], vocab=3000, tile_bytes=bound)
    assert MIN_ROWS * 3000 * 4 <= largest.bytes <= bound


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"vocab": 14}, r"weight \(13, 5\).*vocab=14"),
    ({"vocab": 0}, "vocab=0"),
    ({"hidden": torch.zeros(89, 4, dtype=torch.float64)}, r"hidden \(89, 4\)"),
    ({"hidden": torch.zeros(89, 5)}, "float32, weight.*of one dtype"),
    ({"token_ids": torch.zeros(3, dtype=torch.long)}, r"hidden, token_ids.*\[89, 3, 89, 89, 89, 89\] rows"),
])  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(changes, message):
    batch = hidden_batch()
    assert len(batch["hidden"]) == 89
    with pytest.raises(ValueError, match=message):
        fused(batch, LossSettings(), **changes)
    arguments = batch | changes
    with pytest.raises(ValueError, match=message.replace(", token_ids", " and token_ids").split(".*")[0]):
        lm_head_logps(*(arguments[name] for name in ("hidden", "weight", "token_ids")), vocab=arguments["vocab"])
