"""Training in one process: plan, batches, gradient, trajectory, resume, refusals, and the model that comes out."""

import itertools
import json
import os
import socket
import threading
from contextlib import contextmanager
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch
import training_lake
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from training_lake import make_model, make_profile, naive_gradients, request_of, responses_of

from nbg_core.base import ids
from nbg_core.config.training import TrainingSettings
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Record, Write
from nbg_core.lineage.run import Run
from nbg_core.modeling.chat import encode_prompt
from nbg_core.modeling.loading import load_model, load_tokenizer
from nbg_core.reference import stage as reference_stage
from nbg_core.teacher.store import targets
from nbg_core.training import engine as engines
from nbg_core.training import pair_files
from nbg_core.training import pairs as pairing
from nbg_core.training import plan as plans
from nbg_core.training import train as training
from nbg_core.training.data import TrainingSet, prefetch
from nbg_core.training.request import TrainingError
from nbg_core.training.weights import weight_dtypes

BASE = dict(global_batch_pairs=8, epochs=3, save_every=100, learning_rate=3e-3)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """A group of this process alone; deterministic kernels and thread counts do not leak into other tests."""
    threads = torch.get_num_threads()
    with socket.socket() as s:
        s.bind(("", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**where, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        training.init_distributed()
        yield
    torch.distributed.destroy_process_group()
    training.deepspeed.comm.comm.cdb = None
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return make_profile(tmp_path_factory.mktemp("lake"), n_pairs=12, **BASE)


def run(request) -> list[dict]:
    """Train, and return the metrics of the steps, time aside."""
    training.train(request)
    steps = [json.loads(line) for line in request.steps_file.read_text().splitlines()]
    assert all(step.pop("tokens_per_second") > 0 for step in steps)
    assert all(0 <= step.pop("data_wait") < 1 for step in steps)
    return steps


def weights(folder) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, dtype="float32").named_parameters())


def close(a: list[dict], b: list[dict], tolerance: float) -> None:
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert {k: v for k, v in one.items() if k != "accuracy"} == pytest.approx(
            {k: v for k, v in two.items() if k != "accuracy"}, rel=tolerance, abs=tolerance
        )


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_every_pair_is_used_once_an_epoch(n, size, epochs):
    steps = plans.Plan(n, TrainingSettings(global_batch_pairs=size, epochs=epochs))
    assert [step.index for step in steps] == list(range(epochs * -(-n // size)))
    for epoch in range(epochs):
        assert sorted(np.concatenate([t.pairs for t in steps if t.epoch == epoch])) == list(range(n))


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 100), st.integers(1, 6), st.integers(1, 3),
    st.randoms(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_micro_batches_share_a_step_out_evenly_within_the_budget(n_inputs, budget, world, together, random):
    n_inputs = np.array(n_inputs)
    pairs = np.array(random.sample(range(len(n_inputs)), random.randint(1, len(n_inputs))))  # a step has some of them
    s = TrainingSettings(micro_batch_tokens=budget, sequence_parallel=together, n_processes=together)
    budget *= together  # of a group

    def deal(order: np.ndarray) -> list[list[list[int]]]:
        n = world * together
        ranks = [plans.micro_batches(order, n_inputs, s, rank, n) for rank in range(n)]
        assert {batch.dtype for rank in ranks for batch in rank} == {np.dtype(np.int64)}
        ranks = [[batch.tolist() for batch in rank] for rank in ranks]
        assert all(rank == ranks[i // together * together] for i, rank in enumerate(ranks))  # the same in a group
        return ranks[::together]

    ranks = deal(pairs)
    assert sorted(p for rank in ranks for batch in rank for p in batch) == sorted(pairs)
    assert all(len(batch) <= 1 or n_inputs[batch].sum() <= budget for rank in ranks for batch in rank)
    assert len({len(rank) for rank in ranks}) == 1
    assert deal(np.array(random.sample(pairs.tolist(), len(pairs)))) == ranks
    loads = [sum(n_inputs[p] for batch in rank for p in batch) for rank in ranks]
    last = [min((n_inputs[p] for batch in rank for p in batch), default=0) for rank in ranks]
    assert all(load - n <= min(loads) for load, n in zip(loads, last, strict=True))  # it had least
    # No two micro-batches of a rank fit into one: that holds for whatever fills before it opens another.
    for rank in ranks:
        sums = sorted(n_inputs[batch].sum() for batch in rank if batch)
        assert len(sums) < 2 or sums[0] + sums[1] > budget
    assert any(rank[-1] for rank in ranks)  # no more than the busiest rank needs


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_padded_micro_batches_stay_within_the_budget_with_their_padding(n_inputs, budget):
    n_inputs = np.array(n_inputs)
    s = TrainingSettings(micro_batch_tokens=budget)
    batches = plans.micro_batches(np.arange(len(n_inputs)), n_inputs, s, 0, 1, padded=True)
    assert sorted(np.concatenate(batches)) == list(range(len(n_inputs)))
    assert all(len(b) == 1 or len(b) * n_inputs[b].max() <= budget for b in batches)
    for one, two in zip(batches, batches[1:], strict=False):  # the next pair did not fit
        assert n_inputs[one].min() >= n_inputs[two].max() and (len(one) + 1) * n_inputs[one].max() > budget


def test_an_architecture_that_cannot_be_packed_is_trained_padded_and_says_so(tmp_path, capfd):
    request = request_of(make_profile(tmp_path, n_pairs=6, model=OTHERS["gpt2, padded"], **BASE), "padded")
    data = TrainingSet(request.rows_path, 0)
    assert all(data.batch([pair]).inputs.ids.numel() == data.n_inputs[pair] for pair in range(6))
    steps = run(request)
    assert "model type 'gpt2': prompts are not shared and batches are padded" in capfd.readouterr().out
    assert steps[0]["dpo"] == pytest.approx(np.log(2), abs=1e-6) and steps[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_order_follows_the_seed_and_max_steps_cuts():
    def orders(**kw):
        return [t.pairs.tolist() for t in plans.Plan(20, TrainingSettings(global_batch_pairs=5, epochs=2, **kw))]

    assert orders(seed=1) == orders(seed=1)
    assert orders(seed=1) != orders(seed=2)
    assert orders()[:4] != orders()[4:]  # another order each epoch
    assert orders(max_steps=3) == orders()[:3]
    with pytest.raises(ValueError, match="no pairs"):
        plans.Plan(0, TrainingSettings())


def test_learning_rate_warms_up_then_falls_to_its_minimum():
    s = TrainingSettings(learning_rate=1, warmup_fraction=0.2, min_lr_fraction=0.1, schedule="linear")
    rate = engines.learning_rate(s, 11)
    assert [rate(i) for i in range(3)] == pytest.approx([1 / 4, 2 / 4, 3 / 4])
    assert [rate(i) for i in range(3, 11)] == pytest.approx(np.linspace(1, 0.1, 8))
    cosine = engines.learning_rate(s.model_copy(update={"schedule": "cosine"}), 11)
    assert (cosine(3), cosine(10)) == pytest.approx((1, 0.1))
    assert cosine(4) > rate(4) and cosine(9) < rate(9)
    constant = engines.learning_rate(s.model_copy(update={"schedule": "constant", "warmup_fraction": 0.0}), 11)
    assert {constant(i) for i in range(11)} == {1}


def test_batch_rows_predict_the_response_tokens_first_and_last_included(profile):
    request = request_of(profile, "batch")
    data, responses = TrainingSet(request.rows_path), responses_of(request)
    pairs = [5, 0, 7]
    b = data.batch(pairs)
    ids_, positions = b.inputs.ids[0].tolist(), b.inputs.position_ids[0].tolist()
    at = 0
    for i, pair in enumerate(pairs):
        for side in range(2):
            r = responses.row(2 * pair + side, named=True)
            assert r["pair_id"] == data.pair_id(pair)
            prompt, response = r["prompt_token_ids"], r["token_ids"]
            here = slice(at, at + len(response))
            rows = b.inputs.rows[here].tolist()
            before = [*prompt, *response][len(prompt) - 1 : -1]  # what each response token comes after
            assert [ids_[row] for row in rows] == before
            assert [positions[row] for row in rows] == list(range(len(prompt) - 1, len(prompt) + len(response) - 1))
            assert ids_[rows[0] - len(prompt) + 1 : rows[0] + 1] == prompt
            assert b.token_ids[here].tolist() == response
            assert b.pair_index[here].unique().tolist() == [i] and b.is_chosen[here].unique().tolist() == [side == 0]
            assert b.reference_logps[here].tolist() == r["reference_logprobs"]
            alone = targets(responses[[2 * pair + side]])
            torch.testing.assert_close(b.targets.weights()[here].sum(-1), alone.weights().sum(-1))
            assert b.targets.ids[here, : alone.ids.shape[1]].tolist() == alone.ids.tolist()
            at += len(response)
    assert at == len(b.token_ids) == len(b.targets.ids)
    assert len(ids_) == data.n_inputs[pairs].sum()
    lengths = responses["token_ids"].list.len().to_numpy().reshape(-1, 2)[pairs]
    assert vars(data.denominators(np.array(pairs))) == {
        "pairs": 3, "chosen_tokens": lengths[:, 0].sum(), "rejected_tokens": lengths[:, 1].sum(),
    }  # fmt: skip


def test_prefetch_keeps_order_raises_in_turn_and_is_never_far_ahead():
    made = []

    def task(i: int) -> int:
        made.append(i)
        if i == 7:
            raise OSError("disk gone")
        return i

    found, batches = [], prefetch((partial(task, i) for i in range(100)), ahead=2)
    with pytest.raises(OSError, match="disk gone"):
        for value in batches:
            found.append(value)
            assert len(made) <= len(found) + 4
    assert found == list(range(7))
    early = prefetch((partial(task, 0) for _ in range(100)), ahead=2)
    next(early)
    early.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


OTHERS = {
    "qwen3, untied": dict(architecture="qwen3", tied=False),
    "gemma3, sliding window": dict(architecture="gemma3_text"),
    "gpt2, padded": dict(architecture="gpt2"),
    "gemma3, compiled": dict(architecture="gemma3_text"),
}


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_gradient_of_the_engine_is_that_of_a_naive_loop_in_float64(profile, tmp_path, name):
    model, compiled = OTHERS.get(name), name == "gemma3, compiled"
    profile = make_profile(tmp_path, n_pairs=12, model=model, **BASE) if model else profile
    loss = {"w_dpo": 1.3, "w_pos": 0.7, "w_neg": 0.4, "nll_coef": 0.2, "beta": 0.3}
    more = dict(compile=compiled, gradient_checkpointing=compiled)
    request = request_of(profile, "gradient", loss=loss, micro_batch_tokens=50, **more)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = plans.Plan(12, request.training)[0]
    engine, pad_id = engines.build_engine(request)
    data = TrainingSet(request.rows_path, pad_id)
    padded = pad_id is not None
    assert padded == (name == "gpt2, padded")
    batches = plans.micro_batches(step.pairs, data.n_inputs, request.training, 0, 1, padded=padded)
    assert len(batches) >= 3
    for pairs in batches:
        value, _, _ = engine(data.batch(pairs), data.denominators(step.pairs))
        engines.backward(engine, value)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
    got = {name: p.grad for name, p in engine.module.policy.named_parameters()}

    for name, expected in naive_gradients(request, step.pairs).items():
        torch.testing.assert_close(
            got[name].double(), expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    engine.destroy()


def test_the_trajectory_is_the_pinned_one(profile):
    request = request_of(profile, "pinned")
    steps = run(request)
    assert [s["loss"] for s in steps] == pytest.approx(PINNED, abs=2e-4)
    assert steps[0]["dpo"] == pytest.approx(np.log(2), abs=1e-6)
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-6)


PINNED = [1.94521, 1.81903, 1.45929, 1.3943, 1.2067, 1.28143]


def test_the_token_budget_checkpointing_and_compilation_change_nothing(profile):
    whole = request_of(profile, "whole")
    expected = run(whole)
    for name, changed in {
        "one by one": dict(micro_batch_tokens=1),
        "uneven": dict(micro_batch_tokens=50),
        "recomputed": dict(gradient_checkpointing=True),
        "compiled": dict(compile=True, micro_batch_tokens=50),
    }.items():
        other = request_of(profile, name, **changed)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        close(run(other), expected, 2e-5)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == (name == "compiled")
        for (n, a), b in zip(weights(other.final).items(), weights(whole.final).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=lambda m, n=n, name=name: f"{name} {n}: {m}")


def test_where_nothing_can_be_compiled_the_setting_is_refused(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    torch._dynamo.reset()
    request = request_of(profile, "no compiler", compile=True)
    with pytest.raises(ValueError, match="training.compile: .* install a C and C\\+\\+ compiler"):
        engines.build_engine(request)


@pytest.mark.parametrize("term", ["dpo", "kl_chosen", "kl_rejected", "nll"])
def test_each_term_alone_trains_and_the_others_are_reported(profile, term):
    w = {"dpo": "w_dpo", "kl_chosen": "w_pos", "kl_rejected": "w_neg", "nll": "nll_coef"}
    loss = {name: float(key == term) for key, name in w.items()}
    steps = run(request_of(profile, f"only-{term}", loss=loss, epochs=8, global_batch_pairs=12))
    assert all(s["loss"] == pytest.approx(s[term], rel=1e-4) for s in steps)
    assert steps[-1][term] < 0.9 * steps[0][term]
    assert all(np.isfinite(s[key]) for s in steps for key in w)


class Killed(Exception):
    pass


@pytest.mark.parametrize("damage", [None, "damaged", "half-written"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_was_cut_off_continues_to_the_same_checkpoint(profile, monkeypatch, capsys, stage, damage):
    changed = dict(save_every=2, zero_stage=stage, global_batch_pairs=4, micro_batch_tokens=50)
    undisturbed = request_of(profile, f"undisturbed-{stage}-{damage}", **changed)
    expected = run(undisturbed)
    request = request_of(profile, f"cut-{stage}-{damage}", **changed)
    step = training.train_step

    def cut(engine, data, s, *args):
        if s.index == 7:
            raise Killed
        return step(engine, data, s, *args)

    monkeypatch.setattr(training, "train_step", cut)
    with pytest.raises(Killed):
        training.train(request)
    monkeypatch.undo()
    assert sorted(p.name for p in request.states.glob("step-*")) == [
        "step-00000004", "step-00000004.json", "step-00000006", "step-00000006.json",
    ]  # fmt: skip
    with open(request.steps_file, "a") as f:
        f.write('{"step": 7, "lo')
    if damage == "damaged":
        file = max((request.states / "step-00000006").rglob("*"), key=lambda p: p.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "half-written":
        (request.states / "step-00000006.json").unlink()
    capsys.readouterr()
    assert run(request) == expected
    assert f"continuing after step {4 if damage else 6} of 9" in capsys.readouterr().out
    assert ids.model_id(request.final) == ids.model_id(undisturbed.final)


@contextmanager
def tampered(profile, table: str, change):
    """`table`'s rows of one response go through `change` and come back afterwards; yields the response's pair."""
    lake = Lake.of(profile)
    rows = lake.sql(f"SELECT * EXCLUDE (materialisation_id) FROM {table} ORDER BY sample_id")
    victim = rows.row(2, named=True)
    pair = lake.sql("SELECT * FROM pairs WHERE $1 IN (chosen_id, rejected_id)", [victim["sample_id"]])

    def put(new: list[dict]) -> None:
        write = Write(table, pl.DataFrame(new, schema=rows.schema), "sample_id = ?", (victim["sample_id"],))
        lake.commit(Record(table, victim["slice"], "test", "test"), [write])

    put(change(victim))
    yield pair.row(0, named=True)
    put([victim])


def test_a_policy_that_is_not_the_reference_is_refused_before_the_first_update(profile):
    def shift(row):
        return [row | {"token_logprobs": [row["token_logprobs"][0] - 0.01, *row["token_logprobs"][1:]]}]

    with tampered(profile, "reference_logprobs", shift) as pair:
        request = request_of(profile, "tampered", global_batch_pairs=12)
        message = f"pair {pair['pair_id']} is off by 0.001 .*materialise reference_logprobs"
        with pytest.raises(TrainingError, match=message):
            training.train(request)
    assert not request.final.exists() and not list(request.states.glob("*"))


def test_a_missing_row_names_pair_slice_and_remedy(profile):
    with tampered(profile, "teacher_logits", lambda row: []) as pair:
        message = f"pair {pair['pair_id']} of slice '{pair['slice']}'.*no teacher_logits row.*materialise"
        with pytest.raises(TrainingError, match=message):
            training.train(request_of(profile, "missing"))


@pytest.mark.parametrize("table, column", [("reference_logprobs", "token_logprobs"), ("teacher_logits", "entry_gaps")])
def test_rows_of_another_length_are_refused(profile, table, column):
    with tampered(profile, table, lambda row: [row | {column: row[column][:-1]}]) as pair:
        message = f"pair {pair['pair_id']} of slice '{pair['slice']}'.*response tokens"
        with pytest.raises(TrainingError, match=message):
            training.train(request_of(profile, "short"))


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("samples", lambda row: [], "no samples row.*materialise student_samples"),
        ("reference_logprobs", lambda row: [], "no reference_logprobs row.*materialise reference_logprobs"),
        ("teacher_logits", lambda row: [row | {c: [] for c in LISTS}], "0 teacher positions.*delete"),
    ],
)  # fmt: skip
def test_other_rows_that_do_not_fit_are_named_with_a_remedy(profile, table, change, message):
    with tampered(profile, table, change) as pair:
        with pytest.raises(TrainingError, match=f"pair {pair['pair_id']} .*{message}") as raised:
            request_of(profile, "unfit")
        assert "(1 responses" in str(raised.value)
    rows = profile.resolve(profile.paths.work) / "unfit"
    assert not list(rows.iterdir())


def test_rows_of_other_models_and_other_settings_are_not_trained_on(profile):
    whole = TrainingSet(request_of(profile, "whole").rows_path)
    lake = Lake.of(profile)
    for table in ("teacher_logits", "reference_logprobs"):
        rows = lake.sql(f"SELECT * EXCLUDE (materialisation_id) FROM {table}")
        for column in ("model_id", "settings_id"):
            other = rows.with_columns(pl.lit(f"another {column}").alias(column))
            lake.commit(
                Record(table, "alpha", "test", "test"), [Write(table, other, as_file=table == "teacher_logits")]
            )
    check_same_training_set(TrainingSet(request_of(profile, "beside others").rows_path), whole)
    with lake.connect(read_only=False) as con:
        for table in ("teacher_logits", "reference_logprobs"):
            con.execute(f"DELETE FROM {table} WHERE model_id LIKE 'another %' OR settings_id LIKE 'another %'")


LISTS = ("token_logprobs", "tail_logmass", "head_counts", "tail_counts", "entry_gaps", "entry_logprobs")


def check_same_training_set(found: TrainingSet, expected: TrainingSet) -> None:
    everything = np.arange(len(expected))
    assert found.files.names(everything).equals(expected.files.names(everything))
    assert np.array_equal(found.n_inputs, expected.n_inputs) and np.array_equal(found.n_tokens, expected.n_tokens)
    for number, other in zip(found.files.numbers.ravel(), expected.files.numbers.ravel(), strict=True):
        one, two = found.files.read(number), expected.files.read(other)
        assert all(np.array_equal(one[name], values) and len(values) for name, values in two.items())


def test_a_training_set_written_in_small_parts_with_too_little_memory_at_first_is_the_same(profile, monkeypatch):
    whole = TrainingSet(request_of(profile, "whole").rows_path)
    names = Lake.of(profile).sql("SELECT pair_id, slice FROM pairs ORDER BY pair_id")
    assert whole.files.names(np.arange(12)).equals(names)
    monkeypatch.setattr(pair_files, "JOIN_MEMORY", 1_000_000)
    for module in (pairing, pair_files):
        monkeypatch.setattr(module, "PAIRS_AT_ONCE", 5)
    for name in ("BATCH_ROWS", "RELEASED"):
        monkeypatch.setattr(pair_files, name, 3)
    tried, write = [], pair_files._write_columns

    def fails_at_first(batches, folder, table, *rest):
        def some():
            yield from itertools.islice(batches, 2)
            raise OSError("Out of Memory Error: as Arrow passes it on")

        tried.append(table)
        return write(some() if tried.count(table) == 1 else batches, folder, table, *rest)

    monkeypatch.setattr(pair_files, "_write_columns", fails_at_first)
    check_same_training_set(TrainingSet(request_of(profile, "parts").rows_path), whole)
    assert [tried.count(table) for table in pair_files.TABLES] == [2, 2, 2]


def of_an_older_format(rows) -> None:
    complete = rows / "complete.json"
    complete.write_text(json.dumps(json.loads(complete.read_text()) | {"format": 1}))


@pytest.mark.parametrize(
    "damage",
    [of_an_older_format, lambda rows: (rows / "slices.bin").unlink(), lambda rows: os.truncate(rows / "index.bin", 99)],
    ids=["format", "missing", "cut"],
)
def test_a_training_set_of_another_format_or_damaged_is_written_again(profile, damage):
    request = request_of(profile, "format")
    damage(request.rows_path)
    with pytest.raises(FileNotFoundError, match="no training set at"):
        TrainingSet(request.rows_path)
    check_same_training_set(
        TrainingSet(request_of(profile, "format").rows_path), TrainingSet(request_of(profile, "whole").rows_path)
    )


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_check_of_rows_is_that_of_a_loop(data):
    n, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    tables = {table: data.draw(st.lists(st.integers(0, n - 1), max_size=2 * n)) for table in pairing.NOTES}
    tables = {table: [*range(n), *more] if data.draw(st.booleans()) else more for table, more in tables.items()}
    notes = {table: data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)) for table in tables}
    check = pairing.TrainingSetCheck(np.zeros((n, len(tables)), pairing.RECORD))
    for table, numbers in tables.items():
        check.rows(table, np.array(numbers, int), np.array([notes[table][i] for i in numbers], np.uint32))
    both = np.array(data.draw(st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), min_size=k, max_size=k)))
    names = ("prompt", "response", "teacher", "reference")
    lengths = {name: np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))) for name in names}
    for at in range(k):  # batches of one
        check.pairs(
            lambda _, at=at: f"p{at}", both[at : at + 1], {name: x[both[at : at + 1]] for name, x in lengths.items()}
        )
    unfit, repeated = [], []
    for at, pair in enumerate(both.tolist()):
        here = [all(i in tables[t] for t in tables) for i in pair]
        differ = all(i in tables["samples"] for i in pair) and len({notes["samples"][i] for i in pair}) > 1
        for i, side, whole in zip(pair, ("chosen", "rejected"), here, strict=True):
            more = any(tables[t].count(i) > 1 for t in tables)
            found = [int(lengths[name][i]) for name in names]
            if more or not whole or differ or not notes["teacher_logits"][i] or found != [1, 1, 1, 1]:
                unfit.append((f"p{at}", side))
                repeated += [unfit[-1]] if more else []
    assert check.n_unfit == len(unfit)
    worst = check.worst()
    assert (worst and (worst["pair_id"], worst["side"])) == next(iter(repeated + unfit), None)


@contextmanager
def changed_by(lake: Lake, change: tuple[str, list], undo: tuple[str, list]):
    """The lake after a statement that its contracts would refuse."""

    def execute(statement: str, params: list) -> None:
        with lake.connect(read_only=False) as con:
            con.execute(statement, params)

    execute(*change)
    try:
        yield
    finally:
        execute(*undo)


def test_a_second_row_of_a_response_is_refused(profile):
    lake = Lake.of(profile)
    pair, sample = lake.sql("SELECT pair_id, rejected_id FROM pairs ORDER BY pair_id LIMIT 1 OFFSET 3").row(0)
    copied = "SELECT * REPLACE ('again' AS materialisation_id) FROM teacher_logits WHERE sample_id = ?"
    again = (f"INSERT INTO teacher_logits BY NAME {copied}", [sample])
    message = f"pair {pair} .*rejected response, sample {sample}, has more than one teacher_logits row"
    with changed_by(lake, again, ("DELETE FROM teacher_logits WHERE materialisation_id = ?", ["again"])):
        with pytest.raises(TrainingError, match=message):
            request_of(profile, "a second row")


def test_a_pair_in_two_slices_is_refused(profile, tmp_path):
    lake = Lake.of(profile)
    pair = lake.sql("SELECT pair_id FROM pairs WHERE slice = 'alpha' ORDER BY pair_id LIMIT 1").item()
    again = "INSERT INTO pairs BY NAME SELECT * REPLACE ('beta' AS slice) FROM pairs WHERE pair_id = ?"
    with changed_by(lake, (again, [pair]), ("DELETE FROM pairs WHERE pair_id = ? AND slice = 'beta'", [pair])):
        with pytest.raises(TrainingError, match=f"pair {pair} appears twice.*'alpha' and 'beta'.*filtered_pairs"):
            pairing.count_and_hash_pairs(lake, lake.snapshot(), ["alpha", "beta"], tmp_path / "spill")


def test_a_pair_with_two_prompts_is_refused(profile):
    lake = Lake.of(profile)
    pair, slice_name, sample = lake.sql("SELECT pair_id, slice, rejected_id FROM pairs ORDER BY pair_id LIMIT 1").row(0)
    shift = "UPDATE samples SET prompt_token_ids = list_transform(prompt_token_ids, x -> x {} 1) WHERE sample_id = ?"
    message = f"pair {pair} of slice '{slice_name}'.*other prompt_token_ids.*another sampling.seed"
    with changed_by(lake, (shift.format("+"), [sample]), (shift.format("-"), [sample])):
        with pytest.raises(TrainingError, match=message):
            request_of(profile, "two prompts")


def test_a_loss_that_is_not_finite_names_the_step_and_the_pair(profile):
    request = request_of(profile, "not finite", micro_batch_tokens=1, global_batch_pairs=12)
    data = TrainingSet(request.rows_path)
    at = data.files.read(data.files.numbers[4, 0])["token_logprobs"]
    everything = np.fromfile(request.rows_path / "token_logprobs.bin", np.float32)
    everything[np.lib.stride_tricks.sliding_window_view(everything, len(at)).tolist().index(at.tolist())] = np.inf
    everything.tofile(request.rows_path / "token_logprobs.bin")
    with pytest.raises(TrainingError, match=f"loss of step 0 is not finite, in pairs {data.pair_id(4)}; lower"):
        training.train(request)


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_last_state(profile):
    request = request_of(
        profile, "exploding", learning_rate=1e30, save_every=1, global_batch_pairs=4, warmup_fraction=0
    )
    with pytest.raises(TrainingError, match="gradient of step 1 is not finite, pairs [0-9a-f]{32}.*learning_rate"):
        training.train(request)
    assert (request.states / "step-00000001.json").exists()
    assert len(request.steps_file.read_text().splitlines()) == 1 and not request.final.exists()


def test_zero_3_loads_the_model_into_its_slices(profile):
    path = request_of(profile, "slices").policy_path
    sliced = engines.load_policy(path, TrainingSettings(zero_stage=3))
    assert all(p.numel() == 0 and p.ds_tensor.numel() > 0 for p in sliced.parameters())
    whole = engines.load_policy(path, TrainingSettings())
    with engines.deepspeed.zero.GatheredParameters(list(sliced.parameters())):
        for (name, p), expected in zip(sliced.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, expected), name


def test_heads_that_ranks_cannot_share_out_are_refused(profile):
    with pytest.raises(ValueError, match="sequence_parallel=3: 4 attention heads and 2 key heads"):
        training.train(request_of(profile, "shared", sequence_parallel=3, n_processes=3))


def test_the_result_is_a_model_folder_like_its_parent_with_other_weights(profile):
    request = request_of(profile, "result")
    run(request)
    parent, final = request.policy_path, request.final
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (final / file).read_bytes() == (parent / file).read_bytes()
    before, after = weights(parent), weights(final)
    assert before.keys() == after.keys()
    assert all((before[n] != after[n]).any() for n in before)
    model, tokenizer = load_model(final, dtype="float32"), load_tokenizer(final)
    prompt = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": "w5 w6"}])])
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt.shape[1]
    card = json.loads((final / "training.json").read_text())
    assert (card["parent_model_id"], card["n_pairs"]) == (request.policy_id, 12)
    assert sorted(os.listdir(final)) == sorted([*os.listdir(parent), "training.json"])


def test_bf16_follows_fp32_and_a_bf16_parent_gives_bf16_weights(tmp_path):
    profile = make_profile(tmp_path, model={"tied": False}, n_pairs=8, **BASE)
    student = tmp_path / "student"
    load_model(student, dtype="bfloat16").save_pretrained(student)
    tensors = load_file(student / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()  # some models keep their norms in float32
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    with_new_student = Run(profile, Lake.of(profile), log=lambda line: None)
    for part in ("alpha", "beta"):
        reference_stage.materialise(with_new_student, part)
    exact, rounded = request_of(profile, "fp32"), request_of(profile, "bf16", precision="bf16")
    close(run(rounded), run(exact), 0.04)
    for request in (exact, rounded):
        dtypes = weight_dtypes(request.final)
        assert dtypes.pop("model.norm.weight") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}


LORA = {"rank": 2, "alpha": 3.0}


def test_adapters_alone_train_and_are_merged_into_a_plain_model(profile):
    changed = dict(lora=LORA, schedule="constant", warmup_fraction=0, save_every=1)
    two, one = (request_of(profile, f"adapters {n}", max_steps=n, **changed) for n in (2, 1))
    steps = run(two)
    assert steps[0]["margin"] == run(one)[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert steps[1]["loss"] < steps[0]["loss"]
    state = {}  # after the first step of `two`: what `one` ended with
    for file in (two.states / "step-00000001").iterdir():
        state |= load_file(file)
    assert {name.split(".")[-3] for name in state} == {"lora_A", "lora_B"}  # frozen weights are not in it
    before, after = weights(one.policy_path), weights(one.final)
    assert before.keys() == after.keys()
    for name, w in before.items():
        if "_proj" not in name:
            assert torch.equal(after[name], w), name
            continue
        a, b = (state[name.replace("weight", f"lora_{side}.default.weight/weight")] for side in "AB")
        assert b.abs().max() > 0
        torch.testing.assert_close(after[name], w + 1.5 * b @ a, rtol=0, atol=1e-6)


def test_adapters_of_a_profile_begin_the_same_and_follow_the_seed(profile):
    def first(**changed) -> torch.Tensor:
        settings_ = TrainingSettings(lora=LORA, **changed)
        policy = engines.load_policy(request_of(profile, "begin").policy_path, settings_)
        return policy.model.layers[0].self_attn.q_proj.lora_A["default"].weight

    state = torch.get_rng_state()
    assert torch.equal(first(), first()) and not torch.equal(first(), first(seed=1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("embed_tokens", "contains model.embed_tokens, an embedding"),
        ("lm_head", "contains lm_head"),
        ("x", "x.*not found"),
    ],
)
def test_adapters_where_they_cannot_be_are_refused(profile, target, message):
    with pytest.raises(ValueError, match=message):
        training.train(request_of(profile, "refused", lora=LORA | {"target_modules": [target]}))


def test_the_model_helper_makes_what_the_tests_say(tmp_path):
    folder = make_model(tmp_path / "m", 0)
    assert load_model(folder, dtype="float32").config.vocab_size > len(load_tokenizer(folder)) == training_lake.WORDS
