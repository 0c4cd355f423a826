"""The store: exact top entries, unbiased tail, exact mass, and a round trip, for any distribution."""

import duckdb
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbg_core.base.files import write_parquet
from nbg_core.config.profile import TeacherSettings
from nbg_core.lake import tables
from nbg_core.lake.teacher_columns import GAP_ZERO
from nbg_core.teacher.store import _uniforms, compress, targets


def compressed(logits, settings: TeacherSettings, *, tokens=None, samples=("s",)) -> pl.DataFrame:
    logits = torch.as_tensor(logits, dtype=torch.float32)
    tokens = torch.zeros(len(logits), dtype=torch.long) if tokens is None else torch.as_tensor(tokens)
    lengths = [len(part) for part in np.array_split(np.arange(len(logits)), len(samples))]
    return compress([logits.clone()], tokens, lengths, list(samples), settings)


def positions(rows: pl.DataFrame) -> list[dict]:
    """The stored rows, one dict per position, read by hand from the flat lists."""
    found = []
    for row in rows.iter_rows(named=True):
        at = 0
        for r, (h, t) in enumerate(zip(row["head_counts"], row["tail_counts"], strict=True)):
            gaps, logprobs = row["entry_gaps"][at : at + h + t], row["entry_logprobs"][at : at + h + t]
            ids = [
                int(i) for part in (gaps[:h], gaps[h:]) for i in np.cumsum(np.array(part, dtype=np.int64) - GAP_ZERO)
            ]
            found.append({"top": dict(zip(ids[:h], logprobs[:h], strict=True)), "tail": ids[h:],
                          "mass": row["tail_logmass"][r], "token": row["token_logprobs"][r]})  # fmt: skip
            at += h + t
        assert at == len(row["entry_gaps"]) == len(row["entry_logprobs"])
    return found


logit = st.one_of(st.floats(-60, 60), st.just(float("-inf")))


@st.composite
def distributions(draw):
    vocab = draw(st.integers(1, 40))
    rows = draw(st.lists(st.lists(logit, min_size=vocab, max_size=vocab), min_size=1, max_size=4))
    for row in rows:  # at least one possible token
        row[draw(st.integers(0, vocab - 1))] = draw(st.floats(-60, 60))
    return np.array(rows)


@settings(max_examples=150, deadline=None)
@given(
    distributions(), st.integers(1, 45), st.integers(0, 8), st.sampled_from([0.0, 1e-6, 1e-3, 0.2]),
    st.sampled_from([0.0, 0.01, 0.2]), st.sampled_from([3, 6, 23]),
)  # fmt: skip
@example(np.array([[0, 24.625, 19.375]]), 2, 0, 0.0, 0.0, 3)  # the best entry takes over much
def test_head_is_the_smallest_and_exact_and_mass_is_all_accounted_for(logits, k, m, epsilon, min_weight, bits):
    how = TeacherSettings(k_head=k, m_tail=m, epsilon=epsilon, min_weight=min_weight, logprob_bits=bits)
    rows = compressed(logits, how)
    assert (
        tables.validate(
            "teacher_logits",
            rows.with_columns(
                slice=pl.lit("a"), model_id=pl.lit("m"), settings_id=pl.lit("x"), materialisation_id=pl.lit("i")
            ),
        )
        is not None
    )
    for z, p in zip(logits, positions(rows), strict=True):
        full = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        assert list(p["top"]) == sorted(p["top"])
        lost = 0.0  # at most, by rounding the one before, less probable one
        for token, logprob in sorted(p["top"].items(), key=lambda entry: full[entry[0]]):
            within = (abs(np.log(full[token])) + np.log(2)) * 2.0 ** -(bits + 1)
            if full[token] < 1e-8:  # by itself; else with what the one before lost
                assert abs(logprob - np.log(full[token])) <= within + 1e-5
            else:
                before, lost = lost, (full[token] + lost) * np.expm1(within)
                assert abs(np.exp(logprob) - full[token]) <= before + lost + 1e-4 * full[token]
                assert np.exp(logprob) >= full[token] / 2 * np.exp(-within) * (1 - 1e-4), "half of its mass is kept"
                if before > full[token] / 2:  # it passes on what it cannot give
                    lost += before
        top = sum(map(np.exp, p["top"].values()))
        assert top == pytest.approx(full[list(p["top"])].sum(), abs=3e-4)
        outside = [i for i in range(len(z)) if i not in p["top"]]
        assert np.exp(p["mass"]) == pytest.approx(full[outside].sum(), rel=1e-2, abs=1e-30)
        if p["top"] and outside:  # nothing outside is more probable than something inside
            assert full[outside].max() <= min(full[i] for i in p["top"]) * (1 + 1e-4)
        if not min_weight and full[outside].sum() > epsilon + 1e-6:
            assert len(p["top"]) == min(k, (full > 0).sum()) or len(p["top"]) == k
        smallest = min((full[i] for i in p["top"]), default=1)
        assert len(p["top"]) == 1 or smallest >= min_weight * (1 - 1e-5)
        if len(p["top"]) < k and full[outside].sum() > epsilon + 1e-6:
            assert full[outside].max() <= max(min_weight, 1e-30) * (1 + 1e-5)
        if min_weight and p["tail"]:
            assert len(p["tail"]) == min(m, max(1, int(np.ceil(full[outside].sum() / min_weight - 1e-4)))) or (
                full[outside].sum() / min_weight % 1 < 1e-3
            )
        elif not min_weight:
            assert len(p["tail"]) in (0, m)
        assert not set(p["tail"]) & set(p["top"])
        assert all(full[i] > 0 for i in p["tail"])
        weight = sum(map(np.exp, p["top"].values())) + (np.exp(p["mass"]) if p["tail"] else 0)
        assert weight <= 1 + 1e-2
        if m and full[outside].sum() > epsilon + 1e-6 and full[outside].sum() > 1e-20:
            assert weight == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("bits", [3, 6])
def test_equal_entries_stay_about_equal_and_keep_their_mass(bits):
    """Their errors have one sign: they may not end up in one of them."""
    how = TeacherSettings(k_head=64, min_weight=0, m_tail=0, logprob_bits=bits)
    for n in range(2, 65):
        (p,) = positions(compressed([[0.0] * n + [-np.inf]], how))
        probabilities = np.exp(list(p["top"].values()))
        step = np.log(n) * 2.0**-bits  # at most, between two values that can be stored
        assert len(probabilities) == n and probabilities.sum() == pytest.approx(1, abs=1e-4)
        assert np.abs(np.log(probabilities * n)).max() <= 1.6 * step + 1e-4


def test_a_confident_position_stores_one_entry_and_no_tail():
    (p,) = positions(compressed([[30.0] + [0.0] * 99], TeacherSettings(k_head=16, m_tail=16)))
    assert (list(p["top"]), p["tail"]) == ([0], [])
    assert np.exp(p["mass"]) == pytest.approx(99 * np.exp(-30), rel=2e-3)  # 1 - p would be 0 here


def test_a_tail_too_small_for_a_float_can_be_drawn_from():
    """Regression: rounding leaves some mass outside the top entries on paper, and e^-120 is 0 in float32."""
    z = np.concatenate([np.random.default_rng(0).normal(size=(200, 5)), np.full((200, 3), -120.0)], 1)
    found = positions(compressed(z, TeacherSettings(k_head=5, m_tail=2, epsilon=0.0, min_weight=0)))
    drawn = [p["tail"] for p in found if p["tail"]]
    assert drawn and all(5 <= i < 8 for tail in drawn for i in tail)


def test_one_hot_teacher_has_no_mass_outside():
    (p,) = positions(compressed([[float("-inf"), 0.0, float("-inf")]], TeacherSettings(k_head=3)))
    assert (p["top"], p["tail"], p["mass"]) == ({1: 0.0}, [], float("-inf"))


@pytest.mark.parametrize("min_weight", [0.0, 0.05])
def test_tail_samples_estimate_an_expectation_without_bias(min_weight):
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, 400)
    full = np.exp(z) / np.exp(z).sum()
    value = rng.normal(size=400)
    wanted = (full * value).sum()
    names = [f"s{i}" for i in range(3000)]
    rows = compressed(
        np.tile(z, (3000, 1)), TeacherSettings(k_head=8, m_tail=8, epsilon=0.0, min_weight=min_weight), samples=names
    )
    got = []
    for p in positions(rows):
        top = sum(np.exp(lp) * value[i] for i, lp in p["top"].items())
        got.append(top + np.exp(p["mass"]) * np.mean([value[i] for i in p["tail"]]))
    error = np.std(got) / np.sqrt(len(got))
    assert abs(np.mean(got) - wanted) < 4 * error
    assert np.std(got) > 0


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([5, 130, 2048, 2049, 5000]), st.integers(1, 70), st.floats(0.1, 30), st.integers(0, 2**31),
    st.sampled_from([0.0, 0.02]),
)  # fmt: skip
def test_tail_is_drawn_at_equal_steps_of_what_is_outside_the_head(vocab, n, spread, seed, min_weight):
    """Against a running sum over the whole vocabulary in float64, in one tile and in uneven ones."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, spread, (n, vocab)).astype(np.float32)
    z[rng.random(z.shape) < 0.2] = -np.inf
    z[:, 0] = 0  # something is possible
    s = TeacherSettings(k_head=3, m_tail=7, epsilon=0.0, min_weight=min_weight)
    uniforms = _uniforms("s", n, s.seed)
    rows = compressed(z, s)
    cut = sorted(rng.integers(0, n + 1, 2))
    tiles = [t for t in torch.from_numpy(z).clone().split([cut[0], cut[1] - cut[0], n - cut[1]]) if len(t)]
    again = compress(tiles, torch.zeros(n, dtype=torch.long), [n], ["s"], s)
    assert again.equals(rows)
    wrong = total = 0
    for u, row, p in zip(uniforms, z.astype(np.float64), positions(rows), strict=True):
        outside = np.exp(row - row.max())
        outside[list(p["top"])] = 0
        m = len(p["tail"])
        if m and outside.sum() > 1e-30:
            places = (u + np.arange(m)) / m
            wanted = np.searchsorted(np.cumsum(outside) / outside.sum(), places, side="right")
            wrong += int((wanted != p["tail"]).sum())
            total += m
        assert all(np.isfinite(row[i]) for i in p["tail"])
    assert wrong <= 2 + 0.002 * total  # a place at the edge of an id: the sums of float32 probabilities are rounded


def test_tail_draw_depends_on_sample_and_position_only():
    z = np.random.default_rng(1).normal(size=(6, 300))
    s = TeacherSettings(k_head=4, m_tail=4, min_weight=0)
    together = compressed(z, s, samples=("a", "b"))
    alone = compressed(z[3:], s, samples=("b",))
    assert together.filter(pl.col("sample_id") == "b")["entry_gaps"].to_list() == alone["entry_gaps"].to_list()
    other = compressed(z[3:], s, samples=("c",))
    assert other["entry_gaps"].to_list() != alone["entry_gaps"].to_list()


def test_token_logprob_is_that_of_the_token_at_the_stored_temperature():
    z = np.random.default_rng(2).normal(size=(3, 50))
    (a, b, c) = positions(compressed(z, TeacherSettings(temperature=2.0), tokens=[7, 0, 49]))
    scaled = z / 2
    logp = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    assert [a["token"], b["token"], c["token"]] == pytest.approx([logp[0, 7], logp[1, 0], logp[2, 49]], rel=2e-4)


def test_targets_line_up_positions_of_several_samples():
    z = np.random.default_rng(3).normal(0, 3, size=(5, 60))
    z[2, 10] = 40  # one confident position among wide ones
    rows = compressed(z, TeacherSettings(k_head=6, m_tail=3, min_weight=0), samples=("a", "b"))
    t = targets(rows)
    weights = t.weights()
    for r, p in enumerate(positions(rows)):
        assert dict(zip(t.ids[r][t.is_top[r]].tolist(), t.logprobs[r][t.is_top[r]].tolist(), strict=True)) == p["top"]
        assert t.ids[r][t.is_tail[r]].tolist() == p["tail"]
        assert float(t.tail_logmass[r]) == p["mass"]
        assert float(weights[r].sum()) == pytest.approx(1, abs=1e-3)


def test_responses_of_equal_length_are_lists_like_any_other():
    """Regression: equal lengths became a fixed-size array, which does not concatenate with lists."""
    z = np.random.default_rng(5).normal(size=(6, 40))
    equal = compressed(z, TeacherSettings(), samples=("a", "b"))
    unequal = compressed(z[:5], TeacherSettings(), samples=("c", "d"))
    assert equal.schema == unequal.schema
    assert pl.concat([equal, unequal])["token_logprobs"].list.len().to_list() == [3, 3, 3, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, [-np.inf] * 4])
def test_a_logit_that_is_not_a_number_names_the_sample(bad):
    z = np.zeros((2, 4))
    z[1] = bad if isinstance(bad, list) else [0, 0, bad, 0]
    with pytest.raises(ValueError, match="sample bad"):
        compressed(z, TeacherSettings(), samples=("good", "bad"))


def test_a_300k_vocabulary_is_handled_in_blocks():
    z = np.random.default_rng(4).normal(size=(70, 300_000)).astype(np.float32)
    rows = compressed(z, TeacherSettings(k_head=8, m_tail=8, min_weight=0))
    assert len(rows["entry_gaps"][0]) == 70 * 16
    for r, p in enumerate(positions(rows)):
        assert set(p["top"]) == set(np.argpartition(-z[r], 8)[:8]) and max(p["tail"]) < 300_000


@settings(max_examples=60, deadline=None)
@given(distributions(), st.integers(1, 45), st.integers(0, 8), st.sampled_from([0.0, 0.05]))
def test_a_file_gives_back_what_was_stored_to_sql_and_to_training(tmp_path_factory, logits, k, m, min_weight):
    rows = compressed(logits, TeacherSettings(k_head=k, m_tail=m, epsilon=0.0, min_weight=min_weight))
    path = tmp_path_factory.mktemp("file") / "rows.parquet"
    write_parquet(rows, path, tables.BYTE_SPLIT["teacher_logits"])
    read = duckdb.sql(f"SELECT * FROM '{path}'").pl()
    assert read.to_dicts() == rows.to_dicts()
    t = targets(read)
    for r, p in enumerate(positions(rows)):
        top = dict(zip(t.ids[r][t.is_top[r]].tolist(), t.logprobs[r][t.is_top[r]].tolist(), strict=True))
        assert top == p["top"] and t.ids[r][t.is_tail[r]].tolist() == p["tail"]
