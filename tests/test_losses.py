"""nbg_core.losses against naive references in float64 over the whole vocabulary, and at its limits.

The references below are plain loops over probabilities; they share no code with the module.
Shapes: T tokens, V vocabulary, K stored entries, B pairs.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbg_core.losses.dpo import sequence_dpo_loss
from nbg_core.losses.joint import Denominators, joint_loss
from nbg_core.losses.logps import token_logps
from nbg_core.losses.settings import LossSettings
from nbg_core.losses.targets import TeacherTargets
from nbg_core.losses.token_divergence import bucket_divergence, sampled_tail_forward_kl

KINDS = ("forward", "reverse", "jsd")
LOG_2 = math.log(2)
PINNED = 4.976713467293898
"""test_a_pinned_value: the references above give the same to 15 digits."""


# --- references ------------------------------------------------------------------------------------------------


def ref_probs(logits, temperature=1.0):
    values = [float(x) / temperature for x in logits]
    top = max(values)
    unnormalised = [math.exp(x - top) for x in values]
    total = math.fsum(unnormalised)
    return [u / total for u in unnormalised]


def ref_kl(p, q):
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def ref_divergence(p, q, kind, alpha=0.5):
    if kind == "forward":
        return ref_kl(p, q)
    if kind == "reverse":
        return ref_kl(q, p)
    m = [alpha * a + (1 - alpha) * b for a, b in zip(p, q, strict=True)]
    return alpha * ref_kl(p, m) + (1 - alpha) * ref_kl(q, m)


def ref_buckets(p, top):
    return [p[v] for v in top] + [math.fsum(p[v] for v in range(len(p)) if v not in top)]


def ref_joint(batch, s, denominators):
    """The whole loss from full teacher distributions (`batch.teacher`), a token and a pair at a time."""
    logp = {}  # (pair, chosen) -> [policy sum, reference sum, tokens]
    kl = {True: 0.0, False: 0.0}
    for t in range(len(batch["token_ids"])):
        key = (int(batch["pair_index"][t]), bool(batch["is_chosen"][t]))
        entry = logp.setdefault(key, [0.0, 0.0, 0])
        entry[0] += math.log(ref_probs(batch["logits"][t])[int(batch["token_ids"][t])])
        entry[1] += float(batch["reference_logps"][t])
        entry[2] += 1
        p, q = (ref_probs(batch[name][t], s.temperature) for name in ("teacher", "logits"))
        scale = s.temperature**2 if s.scale_by_temperature_squared else 1
        kl[key[1]] += scale * ref_divergence(p, q, s.divergence, s.jsd_alpha)
    dpo = 0.0
    for b in range(batch["n_pairs"]):
        (pc, rc, nc), (pr, rr, nr) = logp[b, True], logp[b, False]
        h = (pc - rc) / nc - (pr - rr) / nr if s.dpo_variant == "sigmoid_norm" else (pc - rc) - (pr - rr)
        e = s.label_smoothing
        if s.dpo_variant == "ipo":
            dpo += (h - 1 / (2 * s.beta)) ** 2
        elif s.dpo_variant == "hinge":
            dpo += max(0.0, 1 - s.beta * h)
        else:
            dpo += (1 - e) * math.log1p(math.exp(-s.beta * h)) + e * math.log1p(math.exp(s.beta * h))
    nll = -sum(entry[0] for (_, chosen), entry in logp.items() if chosen)
    d = denominators
    return (
        s.w_dpo * dpo / d.pairs
        + s.w_pos * kl[True] / d.chosen_tokens
        + s.w_neg * kl[False] / d.rejected_tokens
        + s.nll_coef * nll / d.chosen_tokens
    )


# --- builders --------------------------------------------------------------------------------------------------


def make_targets(teacher, top, samples=(), *, temperature=1.0, width=None, dtype=torch.float64):
    """TeacherTargets from teacher logits [T, V], top ids per row and tail ids per row; padded to `width`."""
    samples = samples or [()] * len(teacher)
    width = width or max(1, max(len(h) + len(x) for h, x in zip(top, samples, strict=True)))
    n = len(teacher)
    ids, logprobs = np.zeros((n, width), dtype=np.int64), np.zeros((n, width))
    is_top, is_tail, tail_logmass = np.zeros((n, width), bool), np.zeros((n, width), bool), np.full(n, -np.inf)
    for t in range(n):
        p = ref_probs(teacher[t], temperature)
        for j, v in enumerate([*top[t], *samples[t]]):
            ids[t, j], logprobs[t, j] = v, math.log(p[v]) if p[v] > 0 else -math.inf
            (is_top if j < len(top[t]) else is_tail)[t, j] = True
        tail = ref_buckets(p, top[t])[-1]
        tail_logmass[t] = math.log(tail) if tail > 0 else -math.inf
    floats = (torch.tensor(logprobs, dtype=dtype), torch.tensor(tail_logmass, dtype=dtype))
    return TeacherTargets(torch.tensor(ids), floats[0], torch.tensor(is_top), torch.tensor(is_tail), floats[1])


def top_ids(teacher, k):
    return [[int(v) for v in row.argsort(descending=True)[:k]] for row in teacher]


def randn(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_batch(lengths=((3, 2), (1, 4), (2, 1)), vocab=7, seed=0, k=None, temperature=1.0):
    """A batch of len(lengths) pairs; targets hold the whole vocabulary unless k says how many top entries."""
    rows = [(b, side == 0) for b, pair in enumerate(lengths) for side in (0, 1) for _ in range(pair[side])]
    n = len(rows)
    teacher = randn(n, vocab, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        "logits": randn(n, vocab, seed=seed + 2),
        "token_ids": torch.randint(vocab, (n,), generator=generator),
        "pair_index": torch.tensor([b for b, _ in rows]),
        "is_chosen": torch.tensor([c for _, c in rows]),
        "reference_logps": -torch.rand(n, generator=generator, dtype=torch.float64) * 3,
        "targets": make_targets(teacher, top_ids(teacher, k or vocab), temperature=temperature),
        "n_pairs": len(lengths),
        "teacher": teacher,
    }


def take_rows(batch, rows):
    fields = {f.name: getattr(batch["targets"], f.name)[rows] for f in dataclasses.fields(TeacherTargets)}
    out = {k: v[rows] for k, v in batch.items() if isinstance(v, torch.Tensor)}
    return out | {"targets": TeacherTargets(**fields), "n_pairs": batch["n_pairs"]}


def counts(batch):
    chosen = int(batch["is_chosen"].sum())
    return Denominators(batch["n_pairs"], chosen, len(batch["is_chosen"]) - chosen)


def run(batch, s=None, denominators=None, **changes):
    arguments = {k: v for k, v in (batch | changes).items() if k != "teacher"}
    return joint_loss(**arguments, settings=s or LossSettings(), denominators=denominators or counts(batch))


def grad_of(function, logits):
    leaf = logits.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return gradient


def replace(targets, **changes):
    return dataclasses.replace(targets, **changes)


# --- token log-probs -------------------------------------------------------------------------------------------


def test_token_logps_is_the_log_softmax_at_the_token():
    logits, ids = randn(5, 6), torch.tensor([0, 5, 2, 2, 1])
    expected = [math.log(ref_probs(row)[v]) for row, v in zip(logits, ids, strict=True)]
    torch.testing.assert_close(token_logps(logits, ids), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype, out", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                        (torch.float32, torch.float32), (torch.float64, torch.float64)])  # fmt: skip
def test_half_precision_logits_are_computed_in_float32(dtype, out):
    batch = make_batch(k=4)
    low = batch["logits"].to(dtype)
    assert token_logps(low, batch["token_ids"]).dtype == out
    for loss in (sampled_tail_forward_kl, lambda z, t: bucket_divergence(z, t, kind="jsd")):
        value = loss(low, batch["targets"])
        assert value.dtype == out
        torch.testing.assert_close(value, loss(low.double(), batch["targets"]).to(out), rtol=2e-6, atol=2e-6)
    loss, _ = run(batch, logits=low)
    assert loss.dtype == out
    torch.testing.assert_close(loss, run(batch, logits=low.double())[0].to(out), rtol=2e-6, atol=2e-6)


# --- teacher weights -------------------------------------------------------------------------------------------


def test_weights_share_the_tail_mass_and_sum_to_one():
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    targets = make_targets(teacher, [[0]], [[1, 3]], width=5)
    torch.testing.assert_close(targets.weights(), torch.tensor([[0.5, 0.25, 0.25, 0, 0]], dtype=torch.float64))


def test_weights_of_a_row_without_samples_are_the_head_alone():
    teacher = torch.tensor([[0.9, 0.06, 0.04]]).log()
    weights = make_targets(teacher, [[0, 1]], width=3).weights()
    torch.testing.assert_close(weights, torch.tensor([[0.9, 0.06, 0]], dtype=torch.float64), atol=1e-6, rtol=0)


# --- sampled tail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sampled_tail_with_the_whole_vocabulary_is_the_full_kl(temperature):
    teacher, student = randn(6, 9, seed=1), randn(6, 9, seed=2)
    targets = make_targets(teacher, top_ids(teacher, 9), temperature=temperature)
    expected = [ref_kl(ref_probs(teacher[t], temperature), ref_probs(student[t], temperature)) for t in range(6)]
    got = sampled_tail_forward_kl(student, targets, temperature=temperature)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_sampled_tail_value_by_hand():
    """Teacher (1/2, 1/4, 1/8, 1/8), top {0}, samples 1 and 3; uniform student: every log p_s is -log 4."""
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    targets = make_targets(teacher, [[0]], [[1, 3]])
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5)
    got = sampled_tail_forward_kl(torch.zeros(1, 4, dtype=torch.float64), targets)
    assert got.item() == pytest.approx(by_hand, abs=1e-7)


def test_an_id_drawn_twice_counts_twice():
    teacher, student = randn(1, 6, seed=3), randn(1, 6, seed=4)
    top = top_ids(teacher, 2)
    a, b = [v for v in range(6) if v not in top[0]][:2]
    targets = make_targets(teacher, top, [[a, a, a, b]])
    p, q = ref_probs(teacher[0]), ref_probs(student[0])
    t = ref_buckets(p, top[0])[-1]
    expected = sum(p[v] * math.log(p[v] / q[v]) for v in top[0])
    expected += t * (0.75 * math.log(p[a] / q[a]) + 0.25 * math.log(p[b] / q[b]))
    assert sampled_tail_forward_kl(student, targets).item() == pytest.approx(expected, rel=1e-9)
    sparse = torch.zeros(6, dtype=torch.float64)
    for v, weight in [*((v, p[v]) for v in top[0]), (a, 0.75 * t), (b, 0.25 * t)]:
        sparse[v] += weight
    gradient = grad_of(lambda z: sampled_tail_forward_kl(z, targets), student)
    torch.testing.assert_close(gradient[0], student[0].softmax(-1) - sparse)


def systematic_draws(teacher_row, top, m, n, seed):
    """n systematic samples of m ids from outside the top entries: [n, m], one uniform number each."""
    p = np.array(ref_probs(teacher_row))
    p[top] = 0
    points = (np.random.default_rng(seed).random(n)[:, None] + np.arange(m)) / m
    return np.minimum(np.searchsorted(np.cumsum(p) / p.sum(), points, side="right"), len(p) - 1)


@pytest.mark.parametrize("k, m", [(4, 3), (1, 5)])
def test_sampled_tail_is_unbiased_and_so_is_its_gradient(k, m):
    n, vocab = 20_000, 24
    teacher, student = randn(1, vocab, seed=5, scale=1.0), randn(1, vocab, seed=6, scale=1.0)
    top = top_ids(teacher, k)
    one = make_targets(teacher, top, [[0] * m])
    draws = torch.from_numpy(systematic_draws(teacher[0], top[0], m, n, seed=7))
    targets = TeacherTargets(*(getattr(one, f.name).expand(n, *getattr(one, f.name).shape[1:]).clone()
                               for f in dataclasses.fields(one)))  # fmt: skip
    targets.ids[:, k:] = draws
    targets.logprobs[:, k:] = teacher[0].log_softmax(-1)[draws]
    logits = student.expand(n, vocab)
    values = sampled_tail_forward_kl(logits, targets)
    full = ref_kl(ref_probs(teacher[0]), ref_probs(student[0]))
    error, standard_error = values.mean().item() - full, values.std().item() / n**0.5
    assert 0 < standard_error < 0.01
    assert abs(error) < 4 * standard_error
    gradients = grad_of(lambda z: sampled_tail_forward_kl(z, targets), logits)
    expected = student[0].softmax(-1) - teacher[0].softmax(-1)
    spread = gradients.std(0) / n**0.5
    assert ((gradients.mean(0) - expected).abs() < 4.5 * spread + 1e-9).all()


# --- buckets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_bucket_matches_the_reference(kind, k, temperature):
    teacher, student = randn(5, 8, seed=8), randn(5, 8, seed=9)
    top = top_ids(teacher, k)
    targets = make_targets(teacher, top, temperature=temperature, width=k + 2)
    got = bucket_divergence(student, targets, kind=kind, temperature=temperature, jsd_alpha=0.3)
    for t in range(5):
        p, q = (ref_probs(x[t], temperature) for x in (teacher, student))
        if k < 8:
            p, q = ref_buckets(p, top[t]), ref_buckets(q, top[t])
        assert got[t].item() == pytest.approx(ref_divergence(p, q, kind, 0.3), rel=1e-9)


def test_bucket_does_not_read_tail_samples():
    teacher, student = randn(2, 8, seed=10), randn(2, 8, seed=11)
    top = top_ids(teacher, 3)
    rest = [[v for v in range(8) if v not in h][:2] for h in top]
    for kind in KINDS:
        plain = bucket_divergence(student, make_targets(teacher, top), kind=kind)
        sampled = bucket_divergence(student, make_targets(teacher, top, rest), kind=kind)
        torch.testing.assert_close(sampled, plain, rtol=1e-12, atol=0)


def test_jsd_is_symmetric_and_bounded_by_log_2():
    teacher, student = randn(20, 6, seed=12, scale=6.0), randn(20, 6, seed=13, scale=6.0)
    every = [list(range(6))] * 20
    one = bucket_divergence(student, make_targets(teacher, every), kind="jsd")
    two = bucket_divergence(teacher, make_targets(student, every), kind="jsd")
    torch.testing.assert_close(one, two)
    assert (one > 0).all() and (one <= LOG_2).all() and one.max() > 0.6


logit_rows = st.lists(st.floats(-12, 12, width=32), min_size=12, max_size=12)


@settings(max_examples=120, deadline=None)
@given(logit_rows, st.integers(1, 6), st.sampled_from(KINDS))
def test_a_bucket_divergence_is_between_zero_and_the_full_one(values, k, kind):
    teacher, student = torch.tensor(values, dtype=torch.float64).view(2, 1, 6)
    top = top_ids(teacher, k)
    got = bucket_divergence(student, make_targets(teacher, top), kind=kind).item()
    p, q = ref_probs(teacher[0]), ref_probs(student[0])
    full = ref_divergence(p, q, kind)
    assert -1e-12 <= got <= full + 1e-9
    if k == 6:
        assert got == pytest.approx(full, abs=1e-9)


# --- gradients and extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 6])
def test_gradcheck(k):
    teacher, student = randn(3, 6, seed=14), randn(3, 6, seed=15).requires_grad_(True)
    top = top_ids(teacher, k)
    samples = [[v for v in range(6) if v not in h][:2] for h in top]
    targets = make_targets(teacher, top, samples, width=8)
    ids = torch.tensor([0, 5, 2])
    assert torch.autograd.gradcheck(lambda z: token_logps(z, ids), student)
    assert torch.autograd.gradcheck(lambda z: sampled_tail_forward_kl(z, targets, temperature=1.5), student)
    for kind in KINDS:
        check = lambda z, kind=kind: bucket_divergence(z, targets, kind=kind, temperature=1.5, jsd_alpha=0.3)  # noqa: E731
        assert torch.autograd.gradcheck(check, student)


@pytest.mark.parametrize("changes", [
    {}, {"estimator": "bucket", "divergence": "reverse", "nll_coef": 0.5, "temperature": 2.0},
    {"estimator": "bucket", "divergence": "jsd", "dpo_variant": "sigmoid_norm"}, {"dpo_variant": "ipo"},
    {"w_pos": 0.0, "nll_coef": 1.0}, {"w_neg": 0.0, "w_dpo": 0.0},
])  # fmt: skip
def test_gradcheck_of_the_joint_loss(changes):
    batch, s = make_batch(lengths=((2, 1), (1, 2)), vocab=5, k=3), LossSettings(**changes)
    assert torch.autograd.gradcheck(lambda z: run(batch, s, logits=z)[0], batch["logits"].requires_grad_(True))


def extreme_rows():
    """(name, teacher logits, student logits, top ids) where a careless implementation gives NaN or infinity."""
    inf = math.inf
    return [
        ("whole vocabulary among the top entries", [1.0, 0.0, -1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0, 1, 2, 3]),
        ("teacher certain, all kept", [0.0, -inf, -inf, -inf], [0.0, 1.0, 2.0, 3.0], [0, 1, 2, 3]),
        ("teacher certain, one kept", [0.0, -inf, -inf, -inf], [0.0, 1.0, 2.0, 3.0], [0]),
        ("student underflows among the top entries", [0.0, 0.0, 0.0, 0.0], [-1e4, 0.0, 0.0, 0.0], [0, 1]),
        ("student underflows in the tail", [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1e4, -1e4], [0, 1]),
        ("student certain where teacher is not", [0.0, -1e3, 0.0, 0.0], [0.0, 1e4, 0.0, 0.0], [0, 1, 2]),
        ("tail of 1e-9", [0.0, -20.7, -40.0, -50.0], [0.0, 1.0, 2.0, 3.0], [0]),
        ("forbidden columns on both sides", [0.0, 1.0, -inf, -inf], [0.5, 0.0, -inf, -inf], [1, 0]),
        ("forbidden column 0, padding points at it", [-inf, 1.0, 0.0, 0.0], [-inf, 1.0, 0.5, 0.0], [1, 2]),
    ]


@pytest.mark.parametrize("name, teacher, student, top", extreme_rows(), ids=[r[0] for r in extreme_rows()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_finite_with_their_gradients(name, teacher, student, top, dtype):
    targets = make_targets(torch.tensor([teacher]), [top], width=6, dtype=dtype)
    logits = torch.tensor([student], dtype=dtype)
    losses = [sampled_tail_forward_kl] + [lambda z, t, k=k: bucket_divergence(z, t, kind=k) for k in KINDS]
    for loss in losses:
        assert loss(logits, targets).isfinite().all()
        assert grad_of(lambda z, loss=loss: loss(z, targets), logits).isfinite().all()
    p, q = ref_buckets(ref_probs(teacher), top), ref_buckets(ref_probs(student), top)
    if all(b > 0 for a, b in zip(p, q, strict=True) if a > 0):
        got = bucket_divergence(logits, targets, kind="forward").item()
        assert got == pytest.approx(ref_kl(p, q), rel=2e-5, abs=2e-6)


def test_an_underflowing_student_still_gets_the_forward_gradient():
    """log p_s = -10,000 is exact, and the pull on it is p_s - p_T, not 0 from a clamp."""
    teacher = torch.zeros(1, 4, dtype=torch.float64)
    student = torch.tensor([[-1e4, 0.0, 0.0, 0.0]], dtype=torch.float64)
    targets = make_targets(teacher, [[0, 1]])
    value = bucket_divergence(student, targets, kind="forward").item()
    by_hand = 0.25 * (math.log(0.25) + 1e4 + math.log(3)) + 0.25 * math.log(0.75) + 0.5 * math.log(0.5 * 1.5)
    assert value == pytest.approx(by_hand, rel=1e-12)
    gradient = grad_of(lambda z: bucket_divergence(z, targets, kind="forward"), student)
    assert gradient[0, 0].item() == pytest.approx(-0.25)


def test_the_student_tail_does_not_cancel_in_float32():
    """A student tail of 2e-9: 1 - sum is 0 in float32, its logarithm -inf."""
    teacher, student = torch.tensor([[0.0, -3.0, -3.0]]), torch.tensor([[0.0, -20.723266, -20.723266]])
    got = bucket_divergence(student, make_targets(teacher, [[0]], dtype=torch.float32), kind="forward").item()
    expected = ref_kl(ref_buckets(ref_probs(teacher[0]), [0]), ref_buckets(ref_probs(student[0]), [0]))
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_tail_beside_a_complete_head_is_negligible(kind):
    """Another engine may report a tail of 1e-9 where nothing is left outside the top entries."""
    teacher, student = randn(1, 5, seed=1), randn(1, 5, seed=2)
    exact = make_targets(teacher, top_ids(teacher, 5))
    rounded = replace(exact, tail_logmass=torch.full_like(exact.tail_logmass, math.log(1e-9)))
    one, two = (bucket_divergence(student, t, kind=kind) for t in (exact, rounded))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-7)
    assert grad_of(lambda z: bucket_divergence(z, rounded, kind=kind), student).isfinite().all()


def test_padding_entries_have_no_effect():
    batch = make_batch(k=3)
    t = batch["targets"]
    pad = torch.full((len(t.ids), 2), 5)
    junk = torch.tensor([math.nan, 7.0], dtype=torch.float64).expand(len(t.ids), 2)
    no = torch.zeros_like(pad, dtype=torch.bool)
    wide = replace(
        t, ids=torch.cat([t.ids, pad], 1), logprobs=torch.cat([t.logprobs, junk], 1),
        is_top=torch.cat([t.is_top, no], 1), is_tail=torch.cat([t.is_tail, no], 1),
    )  # fmt: skip
    for loss in (sampled_tail_forward_kl, *(lambda z, t, k=k: bucket_divergence(z, t, kind=k) for k in KINDS)):
        torch.testing.assert_close(loss(batch["logits"], wide), loss(batch["logits"], t))
        one, two = (grad_of(lambda z, t=t, loss=loss: loss(z, t), batch["logits"]) for t in (wide, t))
        torch.testing.assert_close(one, two)


def test_an_all_padding_row_is_zero():
    t = make_targets(randn(2, 5), [[], [0, 1]])
    t.tail_logmass[0] = 0.0  # nothing kept: one bucket with all the mass
    logits = randn(2, 5, seed=1)
    assert sampled_tail_forward_kl(logits, t)[0] == 0
    assert [abs(bucket_divergence(logits, t, kind=k)[0].item()) < 1e-12 for k in KINDS] == [True] * len(KINDS)


# --- sequence DPO ----------------------------------------------------------------------------------------------

# policy chosen, policy rejected, reference chosen, reference rejected: log-ratios +2 and -1, h = 3
PAIR = [torch.tensor([x], dtype=torch.float64) for x in (-10.0, -21.0, -12.0, -20.0)]


@pytest.mark.parametrize("variant, smoothing, expected", [
    ("sigmoid", 0.0, 0.5543552444685272),        # log(1 + e^-0.3)
    ("sigmoid", 0.2, 0.6143552444685272),        # 0.8 log(1 + e^-0.3) + 0.2 log(1 + e^0.3) = first + 0.2 * 0.3
    ("sigmoid_norm", 0.0, 0.6587595555486971),   # lengths 4 and 5: h = 2/4 + 1/5 = 0.7, log(1 + e^-0.07)
    ("ipo", 0.0, 4.0),                           # (3 - 1 / 0.2)^2
    ("hinge", 0.0, 0.7),                         # 1 - 0.3
])  # fmt: skip
def test_dpo_variants_by_hand(variant, smoothing, expected):
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([5])}
    terms = sequence_dpo_loss(*PAIR, variant=variant, beta=0.1, label_smoothing=smoothing, **lengths)
    assert terms.loss.item() == pytest.approx(expected, abs=1e-12)
    norm = (4, 5) if variant == "sigmoid_norm" else (1, 1)
    assert terms.chosen_reward.item() == pytest.approx(0.2 / norm[0])
    assert terms.rejected_reward.item() == pytest.approx(-0.1 / norm[1])


def test_hinge_is_zero_past_its_margin():
    assert sequence_dpo_loss(*PAIR, variant="hinge", beta=0.5).loss.item() == 0


def test_dpo_gradient_pulls_the_chosen_up_and_the_rejected_down():
    pc, pr, rc, rr = (x.clone().requires_grad_(True) for x in PAIR)
    terms = sequence_dpo_loss(pc, pr, rc, rr)
    assert not terms.chosen_reward.requires_grad and not terms.rejected_reward.requires_grad
    terms.loss.sum().backward()
    by_hand = 0.1 / (1 + math.exp(0.3))  # beta * sigmoid(-0.3)
    assert (pc.grad.item(), pr.grad.item()) == pytest.approx((-by_hand, by_hand))


def test_dpo_is_finite_at_huge_margins():
    big = [torch.tensor([x], requires_grad=True) for x in (-2e5, 0.0)]
    for variant in ("sigmoid", "ipo", "hinge"):
        loss = sequence_dpo_loss(*big, torch.zeros(1), torch.zeros(1), variant=variant).loss
        assert loss.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), big))
    assert sequence_dpo_loss(*big, torch.zeros(1), torch.zeros(1)).loss.item() == pytest.approx(2e4)


# --- joint loss ------------------------------------------------------------------------------------------------

SETTINGS = [
    LossSettings(),
    LossSettings(w_dpo=0.5, w_pos=2.0, w_neg=3.0, beta=0.3, label_smoothing=0.1, nll_coef=0.7),
    LossSettings(estimator="bucket", divergence="reverse", temperature=2.0),
    LossSettings(estimator="bucket", divergence="jsd", jsd_alpha=0.2, temperature=0.5, dpo_variant="hinge"),
    LossSettings(temperature=2.0, scale_by_temperature_squared=False, dpo_variant="ipo"),
    LossSettings(dpo_variant="sigmoid_norm", beta=2.0, w_pos=0.0),
]


@pytest.mark.parametrize("s", SETTINGS, ids=lambda s: f"{s.dpo_variant}-{s.divergence}-{s.temperature}")
def test_joint_loss_matches_the_reference(s):
    batch = make_batch(temperature=s.temperature)
    denominators = Denominators(5, 11, 13)  # of a global batch that is larger than this one
    loss, _ = run(batch, s, denominators)
    assert loss.item() == pytest.approx(ref_joint(batch, s, denominators), rel=1e-9)


def test_a_pinned_value():
    batch = make_batch(k=3)
    s = LossSettings(nll_coef=0.1, estimator="bucket")
    assert run(batch, s)[0].item() == pytest.approx(PINNED, rel=1e-9)


@pytest.mark.parametrize("variant", ["sigmoid", "sigmoid_norm"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_step_0_is_log_2_exactly_with_margin_0(variant, smoothing):
    batch = make_batch(lengths=((900, 700), (3, 500)), vocab=50, k=4)
    logits = batch["logits"].float()
    s = LossSettings(w_pos=0, w_neg=0, dpo_variant=variant, label_smoothing=smoothing)
    loss, sums = run(batch, s, logits=logits, reference_logps=token_logps(logits, batch["token_ids"]))
    assert loss.item() == torch.tensor(LOG_2, dtype=torch.float32).item()
    assert (sums["margin"].item(), sums["accuracy"].item()) == (0.0, 1.0)  # two ties of a half


def test_dpo_sums_over_tokens():
    """Each token once more: the log-ratios double under sigmoid, and stay under sigmoid_norm."""
    batch = make_batch(lengths=((2, 3),))
    twice = take_rows(batch, torch.arange(5).repeat(2))
    for variant, factor in (("sigmoid", 2), ("sigmoid_norm", 1)):
        s = LossSettings(dpo_variant=variant)
        one, two = run(batch, s)[1], run(twice, s)[1]
        torch.testing.assert_close(two["margin"], factor * one["margin"])
    torch.testing.assert_close(two["chosen_logp"], 2 * one["chosen_logp"])


def test_sums_by_hand():
    batch = make_batch(seed=6)  # of its margins two are positive
    batch["logits"].requires_grad_(True)
    _, sums = run(batch, LossSettings(beta=0.5), Denominators(100, 100, 100))
    policy = [math.log(ref_probs(z)[v]) for z, v in zip(batch["logits"].detach(), batch["token_ids"], strict=True)]
    totals = np.zeros((3, 2, 2))  # pair, rejected, (policy, reference)
    kl = [0.0, 0.0]
    for t, (b, c) in enumerate(zip(batch["pair_index"].tolist(), batch["is_chosen"].tolist(), strict=True)):
        totals[b, int(not c)] += [policy[t], float(batch["reference_logps"][t])]
        kl[int(not c)] += ref_kl(ref_probs(batch["teacher"][t]), ref_probs(batch["logits"][t].detach()))
    reward = 0.5 * (totals[..., 0] - totals[..., 1])
    margin = reward[:, 0] - reward[:, 1]
    assert 0 < (margin > 0).sum() < 3
    expected = {
        "dpo": np.log1p(np.exp(-margin)).sum(), "kl_chosen": kl[0], "kl_rejected": kl[1],
        "nll": -totals[:, 0, 0].sum(), "margin": margin.sum(), "accuracy": (margin > 0).sum(),
        "chosen_reward": reward[:, 0].sum(), "rejected_reward": reward[:, 1].sum(),
        "chosen_logp": totals[:, 0, 0].sum(), "rejected_logp": totals[:, 1, 0].sum(),
        "pairs": 3, "chosen_tokens": 6, "rejected_tokens": 7,
    }  # fmt: skip
    assert {k: v.item() for k, v in sums.items()} == pytest.approx(expected, rel=1e-9)
    assert not any(v.requires_grad or v.dim() or v.dtype != torch.float64 for v in sums.values())


@pytest.mark.parametrize("s", SETTINGS, ids=lambda s: f"{s.dpo_variant}-{s.divergence}-{s.temperature}")
def test_micro_batches_add_up_in_loss_gradient_and_sums(s):
    batch = make_batch(lengths=((3, 2), (1, 4), (2, 1), (5, 5)), k=4, temperature=s.temperature)
    denominators = counts(batch)
    leaf = batch["logits"].clone().requires_grad_(True)
    whole, sums = run(batch, s, denominators, logits=leaf)
    whole.backward()
    whole_grad, leaf.grad = leaf.grad, None
    parts, part_sums = [], []
    for pairs in ((0,), (1, 2), (), (3,)):
        rows = torch.isin(batch["pair_index"], torch.tensor(pairs, dtype=torch.long)).nonzero()[:, 0]
        part = take_rows(batch, rows)
        index = torch.tensor([pairs.index(b) for b in part["pair_index"].tolist()], dtype=torch.long)
        loss, one = run(part, s, denominators, logits=leaf[rows], pair_index=index, n_pairs=len(pairs))
        loss.backward()
        parts.append(loss.detach())
        part_sums.append(one)
    torch.testing.assert_close(sum(parts), whole.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, whole_grad, rtol=1e-12, atol=1e-12)
    for name, value in sums.items():
        torch.testing.assert_close(sum(p[name] for p in part_sums), value, rtol=1e-12, atol=1e-12)


def test_row_order_does_not_matter():
    batch = make_batch(k=4)
    order = torch.randperm(len(batch["token_ids"]), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run(take_rows(batch, order))[0], run(batch)[0])


def test_an_empty_micro_batch_is_a_differentiable_zero():
    empty = take_rows(make_batch(), torch.arange(0)) | {"n_pairs": 0}
    for changes in ({}, {"w_pos": 0.0}, {"w_dpo": 0.0, "w_pos": 0.0, "w_neg": 0.0}, {"estimator": "bucket"}):
        weight = torch.ones(3, 7, requires_grad=True)
        logits = torch.zeros(0, 3) @ weight
        loss, sums = run(empty, LossSettings(**changes), Denominators(1, 1, 1), logits=logits)
        assert loss.item() == 0 and all(v.item() == 0 for v in sums.values())
        loss.backward()
        assert torch.equal(weight.grad, torch.zeros(3, 7))


@pytest.mark.parametrize("row, side", [(0, "kl_chosen"), (2, "kl_chosen"), (3, "kl_rejected"), (4, "kl_rejected")])
@pytest.mark.parametrize("estimator", ["sampled_tail", "bucket"])
def test_first_and_last_token_of_each_response_count(row, side, estimator):
    """Rows 0-2 are the chosen, 3-4 the rejected of pair 0; a change of the teacher or token at one moves its term."""
    batch, s = make_batch(), LossSettings(estimator=estimator)
    teacher = batch["teacher"].clone()
    teacher[row, 0] += 3
    before, after = run(batch, s)[1], run(batch, s, targets=make_targets(teacher, top_ids(teacher, 7)))[1]
    p, q = ref_probs(teacher[row]), ref_probs(batch["logits"][row])
    change = ref_kl(p, q) - ref_kl(ref_probs(batch["teacher"][row]), q)
    assert abs(change) > 0.01
    assert (after[side] - before[side]).item() == pytest.approx(change, rel=1e-8)
    other = {"kl_chosen": "kl_rejected", "kl_rejected": "kl_chosen"}[side]
    torch.testing.assert_close(after[other], before[other])
    ids = batch["token_ids"].clone()
    ids[row] = (ids[row] + 1) % 7
    logp = side.replace("kl_", "") + "_logp"
    moved = run(batch, s, token_ids=ids)[1][logp] - before[logp]
    assert moved.item() == pytest.approx(math.log(q[ids[row]] / q[batch["token_ids"][row]]), rel=1e-8)


def test_temperature_reaches_the_divergence_only():
    batch = make_batch()
    at_one, at_two = (run(batch, LossSettings(temperature=t))[1] for t in (1.0, 2.0))
    assert at_one["kl_chosen"] != at_two["kl_chosen"]
    for name in ("dpo", "nll", "chosen_logp", "rejected_logp", "margin"):
        assert torch.equal(at_one[name], at_two[name])
    plain = run(batch, LossSettings(temperature=2.0, scale_by_temperature_squared=False))[1]
    torch.testing.assert_close(at_two["kl_rejected"], 4 * plain["kl_rejected"])


@pytest.mark.parametrize("estimator, kind", [("sampled_tail", "forward"), *(("bucket", kind) for kind in KINDS)])
@pytest.mark.parametrize("off", ["w_dpo", "w_pos", "w_neg"])
def test_a_term_of_weight_0_is_reported_but_spreads_no_nan(off, estimator, kind):
    """The data of the switched-off term is NaN: loss and gradient equal those of a clean batch, its sum is NaN."""
    clean = make_batch(k=4)
    dirty = dict(clean)
    if off == "w_dpo":
        name, dirty["reference_logps"] = "dpo", torch.full_like(clean["reference_logps"], math.nan)
    else:
        side = clean["is_chosen"] if off == "w_pos" else ~clean["is_chosen"]
        name = "kl_chosen" if off == "w_pos" else "kl_rejected"
        t = clean["targets"]
        dirty["targets"] = replace(
            t, logprobs=t.logprobs.masked_fill(side[:, None], math.nan),
            tail_logmass=t.tail_logmass.masked_fill(side, math.nan),
        )  # fmt: skip
    s = LossSettings(**{off: 0.0}, estimator=estimator, divergence=kind)
    leaves = [clean["logits"].clone().requires_grad_(True) for _ in range(2)]
    results = [run(batch, s, logits=leaf) for batch, leaf in zip((clean, dirty), leaves, strict=True)]
    for loss, _ in results:
        loss.backward()
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(leaves[0].grad, leaves[1].grad)
    assert leaves[0].grad.isfinite().all() and leaves[0].grad.abs().sum() > 0
    full = run(clean, LossSettings(estimator=estimator, divergence=kind))[1]
    torch.testing.assert_close(results[0][1], full)
    assert results[1][1][name].isnan()


def test_all_weights_0_still_give_a_differentiable_zero():
    batch = make_batch()
    leaf = batch["logits"].clone().requires_grad_(True)
    loss, _ = run(batch, LossSettings(w_dpo=0, w_pos=0, w_neg=0), logits=leaf)
    loss.backward()
    assert loss.item() == 0 and torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_each_side_trains_only_its_own_rows():
    batch = make_batch(k=4)
    for on, side in (("w_pos", batch["is_chosen"]), ("w_neg", ~batch["is_chosen"])):
        s = LossSettings(**({"w_dpo": 0.0, "w_pos": 0.0, "w_neg": 0.0} | {on: 1.0}))
        rows = grad_of(lambda z, s=s: run(batch, s, logits=z)[0], batch["logits"]).abs().sum(-1) > 0
        assert torch.equal(rows, side)


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"w_dpo": -1.0}, "w_dpo.*greater than or equal to 0.*input_value=-1.0"),
    ({"w_neg": math.nan}, "w_neg.*finite.*input_value=nan"),
    ({"nll_coef": -0.1}, "nll_coef.*greater than or equal to 0"),
    ({"beta": 0.0}, "beta.*greater than 0"),
    ({"beta": math.inf}, "beta.*finite"),
    ({"dpo_variant": "simpo"}, "dpo_variant.*unknown DPO variant 'simpo'; known: sigmoid, sigmoid_norm, ipo, hinge"),
    ({"label_smoothing": 0.5}, "label_smoothing.*less than 0.5"),
    ({"label_smoothing": 0.1, "dpo_variant": "ipo"}, "label_smoothing.*'ipo'.*set it to 0"),
    ({"label_smoothing": 0.1, "dpo_variant": "hinge"}, "'hinge'.*set it to 0"),
    ({"divergence": "backward", "estimator": "bucket"}, "unknown divergence 'backward'; known: forward, reverse, jsd"),
    ({"estimator": "topk"}, "estimator.*'sampled_tail' or 'bucket'"),
    ({"divergence": "reverse"}, "divergence 'reverse' needs estimator 'bucket'"),
    ({"divergence": "jsd"}, "divergence 'jsd' needs estimator 'bucket'"),
    ({"temperature": 0.0}, "temperature.*greater than 0"),
    ({"jsd_alpha": 1.0}, "jsd_alpha.*less than 1"),
    ({"bata": 0.1}, "bata.*not permitted"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        LossSettings(**changes)


@pytest.mark.parametrize("name", ["pairs", "chosen_tokens", "rejected_tokens"])
def test_denominators_must_be_positive(name):
    with pytest.raises(ValueError, match=rf"{name}=0.*whole optimizer step"):
        Denominators(**({"pairs": 1, "chosen_tokens": 1, "rejected_tokens": 1} | {name: 0}))


def test_functions_refuse_what_the_settings_refuse():
    teacher = randn(1, 4)
    targets = make_targets(teacher, top_ids(teacher, 2))
    for call, message in [
        (lambda: bucket_divergence(teacher, targets, kind="kl"), "divergence.*input_value='kl'"),
        (lambda: bucket_divergence(teacher, targets, kind="jsd", jsd_alpha=0.0), "jsd_alpha.*input_value=0.0"),
        (lambda: sampled_tail_forward_kl(teacher, targets, temperature=-1.0), "temperature.*input_value=-1.0"),
        (lambda: sequence_dpo_loss(*PAIR, variant="sigmoid_norm"), "chosen_lengths"),
        (lambda: sequence_dpo_loss(*PAIR, variant="kto"), "'kto'"),
    ]:
        with pytest.raises(ValueError, match="(?s)" + message):
            call()


def test_arrays_of_different_lengths_are_refused():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"\[13, 12, 13, 13, 13, 13\] rows"):
        run(batch, token_ids=batch["token_ids"][:-1])
