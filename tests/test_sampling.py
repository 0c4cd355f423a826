"""Sampling: the draw is the model's distribution, decided by seeds alone; and only what is missing is drawn."""

import shutil
from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from transformers import GenerationConfig

from nbg_core.base import ids
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Write
from nbg_core.lineage.run import Run
from nbg_core.modeling.chat import encode_prompt, stop_ids
from nbg_core.modeling.loading import load_model, load_tokenizer
from nbg_core.sampling import stage as sampling_stage
from nbg_core.sampling.sampler import Decoding, SamplingRequest
from nbg_core.sampling.transformers_sampler import TransformersSampler

PROMPTS = ["Add: 1 + 2", "Sort: 3 1 2", "x"]


@pytest.fixture
def sampler(make_profile, tiny_models):
    return TransformersSampler(make_profile(), tiny_models.student, batch_size=64)


def ask(sampler, text: str, seeds) -> SamplingRequest:
    return SamplingRequest(sampler.encode([{"role": "user", "content": text}]), list(seeds))


def test_greedy_is_what_transformers_generates(sampler, tiny_models):
    tokenizer, model = load_tokenizer(tiny_models.student), load_model(tiny_models.student, dtype="float32")
    answers = sampler.sample([ask(sampler, p, [0]) for p in PROMPTS], Decoding(0.0, 1.0, 20))
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        ids_ = torch.tensor([sampler.encode([{"role": "user", "content": prompt}])])
        expected = model.generate(ids_, attention_mask=torch.ones_like(ids_), max_new_tokens=20, do_sample=False)
        assert answer.token_ids == expected[0, ids_.shape[1] :].tolist()
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] == tokenizer.eos_token_id else "length")


def test_logprobs_are_the_models_own_at_temperature_one(sampler, tiny_models):
    (responses,) = sampler.sample([ask(sampler, PROMPTS[0], [5, 6])], Decoding(0.7, 0.9, 12))
    model = load_model(tiny_models.student, dtype="float32")
    prompt = ask(sampler, PROMPTS[0], [0]).prompt_token_ids
    for r in responses:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + r.token_ids])).logits[0, len(prompt) - 1 : -1, : sampler.vocab]
        expected = logits.double().log_softmax(-1)[torch.arange(len(r.token_ids)), r.token_ids]
        assert r.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_seed_decides_its_response_whatever_the_batch(sampler, make_profile, tiny_models):
    how = Decoding(1.0, 1.0, 16)
    together = sampler.sample([ask(sampler, p, [11, 12, 13]) for p in PROMPTS], how)
    small = TransformersSampler(make_profile(), tiny_models.student, batch_size=1)
    for prompt, expected in zip(reversed(PROMPTS), reversed(together), strict=True):
        (alone,) = small.sample([ask(small, prompt, [13])], how)
        assert alone[0].token_ids == expected[2].token_ids
    assert len({tuple(r.token_ids) for r in together[0]}) == 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5)])
def test_the_first_token_is_drawn_from_the_stated_distribution(sampler, tiny_models, temperature, top_p):
    n = 4000
    request = ask(sampler, "x", range(n))
    (responses,) = sampler.sample([request], Decoding(temperature, top_p, 1))
    with torch.no_grad():
        model = load_model(tiny_models.student, dtype="float32")
        z = model(torch.tensor([request.prompt_token_ids])).logits[0, -1, : sampler.vocab].double().numpy()
    p = np.exp(z / temperature - (z / temperature).max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    q = np.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    counts = Counter(r.token_ids[0] for r in responses)
    assert all(q[t] > 0 for t in counts)
    observed = np.array([counts[t] for t in kept])
    chi = ((observed - n * q[kept]) ** 2 / (n * q[kept])).sum()
    assert chi < len(kept) + 5 * np.sqrt(2 * len(kept))
    assert all(r.finish_reason == "length" or r.token_ids == [sampler.tokenizer.eos_token_id] for r in responses)


def test_a_response_ends_with_the_end_token_and_text_has_no_special_tokens(sampler):
    (responses,) = sampler.sample([ask(sampler, "x", range(60))], Decoding(1.0, 1.0, 200))
    stopped = [r for r in responses if r.finish_reason == "stop"]
    assert stopped
    for r in stopped:
        assert r.token_ids.count(sampler.tokenizer.eos_token_id) == 1
        assert r.token_ids[-1] == sampler.tokenizer.eos_token_id
        assert "<|end|>" not in sampler.decode(r.token_ids)
    assert all(len(r.token_ids) == 200 for r in responses if r.finish_reason == "length")


def add_queries(run: Run, prompts: list[str]) -> None:
    rows = [
        {"slice": "a", "split": "train", "messages": [{"role": "user", "content": p}], "prompt": p, "answer": None,
         "verifier": None, "verifier_args": None, "source_file": "a.jsonl", "source_line": i + 1,
         "query_id": ids.query_id([{"role": "user", "content": p}])}
        for i, p in enumerate(prompts)
    ]  # fmt: skip
    (run.profile.resolve(run.profile.paths.queries) / "a.jsonl").touch()
    run.commit("queries", "a", [Write("queries", pl.DataFrame(rows))], data_version=ids.content_version(prompts))


@pytest.fixture
def run(make_profile):
    profile = make_profile(sampling={"n_student": 3, "n_teacher": 1, "max_tokens": 8, "chunk_queries": 2})
    return Run(profile, Lake.of(profile), log=lambda line: None)


def test_only_missing_responses_are_drawn(run):
    add_queries(run, ["one", "two", "three"])
    first = sampling_stage.materialise(run, "a")
    assert (first.rows, first.new_rows) == (12, 12)
    assert dict(run.lake.sql("SELECT source, count(*) FROM samples GROUP BY ALL").iter_rows()) == {
        "student": 9, "teacher": 3}  # fmt: skip
    again = sampling_stage.materialise(run, "a")
    assert (again.rows, again.new_rows, again.data_version) == (12, 0, first.data_version)
    add_queries(run, ["four"])
    assert sampling_stage.materialise(run, "a").new_rows == 4


def test_more_responses_per_query_get_the_next_numbers(run):
    add_queries(run, ["one"])
    sampling_stage.materialise(run, "a")
    more = run.profile.sampling.model_copy(update={"n_student": 5, "n_teacher": 2})
    wider = Run(run.profile.model_copy(update={"sampling": more}), run.lake, log=lambda line: None)
    assert sampling_stage.materialise(wider, "a").new_rows == 3
    rows = run.lake.sql("SELECT source, sample_index FROM samples ORDER BY ALL").rows()
    assert rows == [*(("student", i) for i in range(5)), ("teacher", 0), ("teacher", 1)]


def test_the_end_tokens_of_the_generation_config_and_of_the_tokenizer_end_a_response(tiny_models):
    tokenizer = load_tokenizer(tiny_models.student)
    for configured, expected in ((None, set()), (7, {7}), ([7, 9], {7, 9})):
        stops = stop_ids(GenerationConfig(eos_token_id=configured), tokenizer)
        assert stops == expected | {tokenizer.eos_token_id}


def test_new_queries_among_old_ones_fill_whole_chunks(run):
    add_queries(run, [f"old {i}" for i in range(12)])
    sampling_stage.materialise(run, "a")
    before = run.lake.sql("SELECT count(*) FROM lineage.materialisations WHERE status = 'chunk'").item()
    add_queries(run, [f"new {i}" for i in range(4)])  # their ids are scattered among the others
    assert sampling_stage.materialise(run, "a").new_rows == 4 * 4
    chunks = run.lake.sql("SELECT n_rows FROM lineage.materialisations WHERE status = 'chunk' ORDER BY snapshot_id")
    assert chunks["n_rows"][before:].to_list() == [2 * 3, 2 * 3, 2 * 1, 2 * 1]


def test_teacher_and_student_get_the_prompt_of_the_students_template(run, tiny_models, tmp_path):
    teacher = shutil.copytree(tiny_models.teacher, tmp_path / "teacher")
    tokenizer = load_tokenizer(teacher)
    tokenizer.chat_template = "{{ 'Q: ' + messages[0]['content'] }}"
    tokenizer.save_pretrained(teacher)
    models = run.profile.models.model_copy(update={"teacher": teacher})
    run = Run(run.profile.model_copy(update={"models": models}), run.lake, log=lambda line: None)
    add_queries(run, ["one"])
    sampling_stage.materialise(run, "a")
    (prompt,) = run.lake.sql("SELECT DISTINCT prompt_token_ids FROM samples")["prompt_token_ids"].to_list()
    student = load_tokenizer(tiny_models.student)
    assert prompt == encode_prompt(student, [{"role": "user", "content": "one"}])


def test_held_out_queries_are_never_sampled(run):
    add_queries(run, ["one", "two"])
    with run.lake.connect(read_only=False) as con:
        con.execute("UPDATE queries SET split = 'eval' WHERE prompt = 'two'")
    sampling_stage.materialise(run, "a")
    held_out = run.lake.sql("SELECT count(*) FROM samples JOIN queries USING (query_id) WHERE split = 'eval'").item()
    assert (held_out, run.lake.sql("SELECT count(*) FROM samples").item()) == (0, 4)


def test_a_run_that_dies_midway_keeps_its_chunks_and_ends_as_if_undisturbed(run, make_profile, monkeypatch):
    prompts = [f"query {i}" for i in range(6)]
    add_queries(run, prompts)
    calls = []
    real = TransformersSampler.stream

    def dies(self, requests, decoding):
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, requests, decoding)

    monkeypatch.setattr(TransformersSampler, "stream", dies)
    with pytest.raises(KeyboardInterrupt):
        sampling_stage.materialise(run, "a")
    assert run.lake.sql("SELECT count(*) FROM samples").item() == 2 * 3
    report = sampling_stage.materialise(run, "a")
    assert report.new_rows == 6 * 4 - 2 * 3
    other = make_profile(
        sampling=run.profile.sampling.model_dump(), lake={"catalog": "sqlite:o.sqlite", "data_path": "other"}
    )
    fresh = Run(other, Lake.of(other), log=lambda line: None)
    add_queries(fresh, prompts)
    sampling_stage.materialise(fresh, "a")
    query = "SELECT sample_id, token_ids FROM samples ORDER BY sample_id"
    assert run.lake.sql(query).equals(fresh.lake.sql(query))


def test_a_prompt_that_does_not_fit_the_context_is_named(run):
    add_queries(run, ["y" * 300])
    with pytest.raises(ValueError, match=r"has 30\d prompt tokens; .* exceeds the 256 tokens that"):
        sampling_stage.materialise(run, "a")


def test_a_sampler_that_dies_midway_leaves_what_was_finished(run, monkeypatch):
    add_queries(run, ["one", "two"])
    real = TransformersSampler.stream

    def dies(self, requests, decoding):
        yield from list(real(self, requests, decoding))[:2]
        raise RuntimeError("the server died")

    monkeypatch.setattr(TransformersSampler, "stream", dies)
    with pytest.raises(RuntimeError, match="the server died"):
        sampling_stage.materialise(run, "a")
    assert run.lake.sql("SELECT count(*) FROM samples").item() == 2
    monkeypatch.undo()
    assert sampling_stage.materialise(run, "a").new_rows == 2 * 4 - 2


def test_long_chunks_are_committed_as_they_go(run, monkeypatch):
    add_queries(run, ["one", "two"])
    monkeypatch.setattr("nbg_core.base.progress.COMMIT_SECONDS", 0.0)
    sampling_stage.materialise(run, "a")
    commits = run.lake.sql("SELECT count(*) FROM lineage.commits WHERE asset = 'student_samples'").item()
    assert commits >= 2 * 4 and run.lake.sql("SELECT count(DISTINCT sample_id) FROM samples").item() == 2 * 4


@pytest.mark.parametrize("landed", [False, True])
def test_a_commit_that_is_cut_short_is_made_again_at_the_end(run, monkeypatch, landed):
    add_queries(run, ["one", "two"])
    real, calls = Lake.commit, []

    def cut_short(self, record, writes=()):
        calls.append(record)
        made = real(self, record, writes) if landed or len(calls) > 1 else None
        if len(calls) == 1:
            raise SystemExit(143)  # as a signal does, wherever it comes
        return made

    monkeypatch.setattr(Lake, "commit", cut_short)
    with pytest.raises(SystemExit):
        sampling_stage.materialise(run, "a")
    assert run.lake.sql("SELECT count(*) FROM samples").item() == 2 * 3
    assert sampling_stage.materialise(run, "a").new_rows == 2  # the teacher's
