"""Teacher forcing: stored rows are those of the very token ids, at the right positions, scored once."""

import json
import shutil

import numpy as np
import polars as pl
import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

from nbg_core.base import ids
from nbg_core.checks.checks import CHECKS, Subject
from nbg_core.config import identity
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import samples_of_pairs
from nbg_core.lake.records import Record, Write
from nbg_core.lineage.run import Run
from nbg_core.modeling import lm_head_tiles
from nbg_core.modeling.forward import collate
from nbg_core.modeling.loading import check_same_tokenizer, load_model
from nbg_core.modeling.scoring import LogprobModel
from nbg_core.preference.scoring import score_samples
from nbg_core.reference import stage as reference_stage
from nbg_core.sampling import stage as sampling_stage
from nbg_core.teacher import stage as teacher_stage
from nbg_core.teacher import store
from nbg_core.teacher.engine import open_engine
from nbg_core.teacher.store import targets
from nbg_core.training.pair_files import PairFiles, write_pair_files
from nbg_core.training.request import TrainingRequest

PAIRS = [("p1", "s1", "s2"), ("p2", "s3", "s2")]
TOKENS = {"s1": [65, 66, 259], "s2": [67, 259], "s3": [70, 71, 72, 73, 74, 259], "s4": [80, 259]}
PROMPT = {"s1": [257, 49, 258], "s2": [257, 49, 258], "s3": [257, 50, 51, 52, 258], "s4": [257, 258]}


@pytest.fixture
def run(make_profile):
    profile = make_profile(teacher={"k_head": 16, "m_tail": 4, "batch_tokens": 12, "chunk_samples": 2})
    (profile.resolve(profile.paths.queries) / "a.jsonl").touch()
    run = Run(profile, Lake.of(profile), log=lambda line: None)
    samples = [
        {"slice": "a", "sample_id": s, "query_id": "q", "source": "student", "model_id": "m", "sampling_id": "x",
         "sample_index": i, "seed": 0, "prompt_token_ids": PROMPT[s], "token_ids": t, "logprobs": [-1.0] * len(t),
         "finish_reason": "stop", "text": ""}
        for i, (s, t) in enumerate(TOKENS.items())
    ]  # fmt: skip
    pairs = [
        {"slice": "a", "pair_id": p, "query_id": "q", "chosen_id": c, "rejected_id": r, "chosen_score": 1.0,
         "rejected_score": 0.0, "margin": 1.0} for p, c, r in PAIRS
    ]  # fmt: skip
    run.lake.commit(Record("student_samples", "a", "r", "t"), [Write("samples", pl.DataFrame(samples))])
    run.commit("filtered_pairs", "a", [Write("pairs", pl.DataFrame(pairs))], data_version="v")
    return run


def naive_logps(path, sample: str) -> np.ndarray:
    """log p [R, V] of one sequence alone, in float64."""
    model = load_model(path, dtype="float32").double()
    ids_ = torch.tensor([PROMPT[sample] + TOKENS[sample]])
    with torch.no_grad():
        return model(ids_).logits[0, len(PROMPT[sample]) - 1 : -1, :260].log_softmax(-1).numpy()


def test_rows_are_the_teachers_at_the_response_positions(run, tiny_models):
    report = teacher_stage.materialise(run, "a")
    assert (report.rows, report.new_rows) == (3, 3)  # s4 is in no pair, s2 is in two
    rows = run.lake.sql("SELECT * FROM teacher_logits ORDER BY sample_id")
    assert rows["sample_id"].to_list() == ["s1", "s2", "s3"]
    for row in rows.partition_by("sample_id"):
        sample = row["sample_id"][0]
        full = naive_logps(tiny_models.teacher, sample)
        t = targets(row)
        expected = full[np.arange(len(full)), TOKENS[sample]]
        assert row["token_logprobs"][0].to_list() == pytest.approx(expected.tolist(), abs=5e-4)
        for r in range(len(full)):
            top = t.ids[r][t.is_top[r]].numpy()
            assert set(top) == set(np.argsort(-full[r])[: len(top)])
            outside = np.delete(np.exp(full[r]), top).sum()
            assert np.exp(float(t.tail_logmass[r])) == pytest.approx(outside, rel=1e-3)


def test_scoring_again_does_nothing_and_other_settings_are_other_rows(run):
    first = teacher_stage.materialise(run, "a")
    assert teacher_stage.materialise(run, "a").new_rows == 0
    wider = run.profile.model_copy(update={"teacher": run.profile.teacher.model_copy(update={"k_head": 20})})
    other = teacher_stage.materialise(Run(wider, run.lake, log=lambda line: None), "a")
    assert other.new_rows == 3
    assert other.storage_id != first.storage_id


def with_processes(run: Run, n: int) -> Run:
    teacher = run.profile.teacher.model_copy(update={"n_processes": n, "batch_tokens": 4096})
    return Run(run.profile.model_copy(update={"teacher": teacher}), run.lake, log=lambda line: None)


def test_two_processes_store_what_one_does_and_one_that_dies_is_named(run, tiny_models):
    one, two = with_processes(run, 1), with_processes(run, 2)
    assert identity.storage_id(one.profile) == identity.storage_id(two.profile)
    report = teacher_stage.materialise(two, "a")
    assert (report.rows, report.new_rows) == (3, 3)
    columns = "sample_id, token_logprobs, head_counts, tail_counts, entry_gaps"
    made = run.lake.sql(f"SELECT {columns} FROM teacher_logits ORDER BY sample_id")
    samples = samples_of_pairs(run.lake, "a", run.lake.snapshot())
    with open_engine(one, tiny_models.teacher) as rows_of:
        alone = pl.concat(rows_of(samples)).select(made.columns).sort("sample_id")
    assert alone.drop("token_logprobs").equals(made.drop("token_logprobs"))
    for mine, other in zip(alone["token_logprobs"], made["token_logprobs"], strict=True):
        assert mine.to_list() == pytest.approx(other.to_list(), rel=1e-3)

    rng = np.random.default_rng(0)
    many = pl.DataFrame({
        "sample_id": [f"{i:032}" for i in range(1600)], "prompt_token_ids": rng.integers(1, 255, (1600, 8)).tolist(),
        "token_ids": rng.integers(1, 255, (1600, 100)).tolist(),
    })  # fmt: skip
    with open_engine(two, tiny_models.teacher) as rows_of:
        frames = rows_of(many)
        assert next(frames).height
        for child in psutil.Process().children(recursive=True):
            child.kill()
        with pytest.raises(RuntimeError, match="a scoring process died.*lower teacher.n_processes"):
            list(frames)


def test_reference_rows_are_the_policys_logprobs(run, tiny_models):
    report = reference_stage.materialise(run, "a")
    assert (report.rows, report.new_rows) == (3, 3)
    for sample, logprobs in run.lake.sql("SELECT sample_id, token_logprobs FROM reference_logprobs").iter_rows():
        full = naive_logps(tiny_models.student, sample)
        assert logprobs == pytest.approx(full[np.arange(len(full)), TOKENS[sample]].tolist(), abs=1e-4)
    assert reference_stage.materialise(run, "a").new_rows == 0
    assert set(run.lake.sql("SELECT model_id FROM reference_logprobs")["model_id"]) == {
        ids.model_id(tiny_models.student)
    }


def test_another_dtype_is_other_rows_and_training_reads_its_own(run, tmp_path):
    exact = {m.ASSET: m.materialise(run, "a") for m in (teacher_stage, reference_stage)}
    models = run.profile.models.model_copy(update={"dtype": "bfloat16"})
    rounded = Run(run.profile.model_copy(update={"models": models}), run.lake, log=lambda line: None)
    for module in (teacher_stage, reference_stage):
        report = module.materialise(rounded, "a")
        assert report.new_rows == 3
        assert report.data_version != exact[module.ASSET].data_version
    with run.lake.connect(read_only=False) as con:  # p2's responses answer two prompts, which training refuses
        con.execute("UPDATE samples SET prompt_token_ids = [257, 258]")
    for r in (run, rounded):
        scoring = identity.scoring_id(r.profile)
        request = TrainingRequest(
            training_id="t", catalog=run.lake.catalog, data_path=run.lake.data_path, snapshot=run.lake.snapshot(),
            slices=["a"], policy_id=r.policy.model_id, policy_path=r.policy.path,
            storage_id=identity.storage_id(r.profile),
            teacher_id=ids.model_id(r.profile.resolve(r.profile.models.teacher)), scoring_id=scoring, temperature=1.0,
            training=r.profile.training, work=tmp_path / scoring,
        )  # fmt: skip
        write_pair_files(run.lake, request, lambda line: None)
        rows = PairFiles(request.rows_path)
        assert rows.n_pairs == 2
        read = {tuple(rows.read(number)["token_logprobs"].tolist()) for number in np.unique(rows.numbers)}
        mine = run.lake.sql("SELECT token_logprobs FROM reference_logprobs WHERE settings_id = ?", [scoring])
        assert read == set(map(tuple, mine["token_logprobs"]))
        subject = Subject(run.lake, r.profile, "reference_logprobs", "a")
        assert CHECKS["one_row_per_response"].violations(subject).is_empty()


def test_every_row_names_a_commit_with_its_input(run):
    teacher_stage.materialise(run, "a")
    joined = run.lake.sql(
        "SELECT t.sample_id, c.asset, c.snapshot_id, c.inputs FROM teacher_logits t "
        "JOIN lineage.commits c USING (materialisation_id)"
    )
    assert joined.height == 3
    assert set(joined["asset"]) == {"teacher_logits"}
    assert all('"filtered_pairs"' in i for i in joined["inputs"])


def test_a_teacher_with_another_tokenizer_is_refused(tiny_models, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_models.teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="different tokenizers: 1 tokens differ, first '<|extra|>'"):
        check_same_tokenizer(tiny_models.student, folder)
    assert check_same_tokenizer(tiny_models.student, tiny_models.teacher) == 260


def changed_tokenizer(folder, target, change):
    """A copy of a model folder whose tokenizer.json `change` has edited in place."""
    shutil.copytree(folder, target)
    content = json.loads((target / "tokenizer.json").read_text())
    change(content)
    (target / "tokenizer.json").write_text(json.dumps(content))
    return target


def test_special_tokens_must_be_the_same_but_padding_may_differ(tiny_models, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(tiny_models.teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    assert check_same_tokenizer(tiny_models.student, folder) == 260
    tokenizer.add_special_tokens({"bos_token": "A"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="special tokens: only one of them has 'A'"):
        check_same_tokenizer(tiny_models.student, folder)


def test_no_response_is_drawn_or_scored_with_a_teacher_of_another_tokenizer(run, tiny_models, tmp_path, make_profile):
    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    other = changed_tokenizer(tiny_models.teacher, tmp_path / "other", swap)
    profile = make_profile(
        models={"student": tiny_models.student, "teacher": other}, preference={"weights": {"teacher_loglik": 1.0}}
    )
    run = Run(profile, run.lake, log=lambda line: None)
    samples = run.lake.sql("SELECT *, NULL AS verifier, NULL AS answer, NULL AS verifier_args FROM samples")
    with pytest.raises(ValueError, match="2 tokens differ, first 'a'"):
        score_samples(run, "a", samples, [])
    assert run.lake.sql("FROM scores").is_empty()
    run.commit("queries", "a", data_version="v")
    with pytest.raises(ValueError, match="2 tokens differ, first 'a'"):
        sampling_stage.materialise(run, "a")


def test_the_trainers_and_the_stores_rows_stay_in_step_after_a_new_pair(run):
    teacher_stage.materialise(run, "a")
    pair = {"slice": "a", "pair_id": "p3", "query_id": "q", "chosen_id": "s4", "rejected_id": "s2", "chosen_score": 1.0,
            "rejected_score": 0.0, "margin": 1.0}  # fmt: skip
    run.commit("filtered_pairs", "a", [Write("pairs", pl.DataFrame([pair]))], data_version="v2")
    report = teacher_stage.materialise(run, "a")
    assert (report.rows, report.new_rows) == (4, 1)


@pytest.mark.parametrize("packed", [True, False])
def test_forward_passes_stay_within_the_budget(run, tiny_models, packed):
    """Of responses that share a prompt of 30 tokens: a batch that is cut among them computes it again."""
    shared = {"prompt_token_ids": [[7] * 30] * 12 + [[9] * 5] * 4, "token_ids": [[65] * n for n in range(1, 17)]}
    samples = pl.DataFrame({"sample_id": [f"{i:02}" for i in range(16)], **shared})
    scorer = LogprobModel(run.profile, tiny_models.teacher)
    scorer.packed, scorer.batch_tokens = packed, 60
    scored = list(scorer.score(samples))
    inputs = [collate(s.samples["prompt_token_ids"].to_list(), s.samples["token_ids"].to_list(), None if packed else 0)
              for s in scored]  # fmt: skip
    assert len(scored) > 2 and all(i.ids.numel() <= 60 for i in inputs)
    assert sorted(sample for s in scored for sample in s.samples["sample_id"]) == samples["sample_id"].to_list()


def test_a_scoring_process_that_cannot_start_says_why(run, tmp_path):
    with open_engine(with_processes(run, 2), tmp_path / "nowhere") as rows_of:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            list(rows_of(samples_of_pairs(run.lake, "a", run.lake.snapshot())))


def test_finished_rows_do_not_wait_for_the_end_of_a_chunk(run, monkeypatch):
    monkeypatch.setattr("nbg_core.base.progress.COMMIT_SECONDS", 0.0)
    whole = run.profile.teacher.model_copy(update={"chunk_samples": 100})
    teacher_stage.materialise(
        Run(run.profile.model_copy(update={"teacher": whole}), run.lake, log=lambda line: None), "a"
    )
    commits = run.lake.sql("SELECT count(*) FROM lineage.commits WHERE asset = 'teacher_logits' AND n_rows > 0").item()
    assert commits > 1


def test_memory_does_not_grow_with_vocabulary_times_length(run, tiny_models, monkeypatch):
    """No tensor is as large as the logits of a response, and a longer one needs no larger tensors."""

    def largest(n: int) -> int:
        samples = pl.DataFrame({"sample_id": ["s"], "prompt_token_ids": [[257, 258]], "token_ids": [[65] * n]})
        monkeypatch.setattr(lm_head_tiles, "TILE_BYTES", {"cpu": 16 * 4 * 260})
        monkeypatch.setattr(store, "BLOCK_BYTES", {"cpu": 16 * 4 * 260})
        with open_engine(run, tiny_models.teacher) as rows_of:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                assert sum(frame.height for frame in rows_of(samples)) == 1
        return max(e.self_cpu_memory_usage for e in profiler.events())

    assert largest(240) < 240 * 260 * 4 and largest(240) < 2.5 * largest(120)
