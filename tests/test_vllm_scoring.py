"""Teacher rows from `prompt_logprobs`: those of the transformers engine, and never of a wrong answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tenacity
import torch
from fake_vllm import FakeVllm
from test_teacher_scoring import run as scored_run

from nbg_core.base import ids
from nbg_core.config.profile import Profile, TeacherSettings
from nbg_core.lineage.run import Run
from nbg_core.modeling.loading import load_model
from nbg_core.preference.scoring import score_samples
from nbg_core.teacher.stage import materialise
from nbg_core.teacher.store import compress, targets
from nbg_core.teacher.vllm_scoring import IMPOSSIBLE, _row
from nbg_core.vllm.client import BadAnswer, ServerFailed

run = scored_run

V, K, PROMPT, RESPONSE = 40, 8, [3, 1, 4], [7, 39, 0, 12]
SETTINGS = TeacherSettings(engine="vllm", k_head=K, m_tail=0, min_weight=0, epsilon=1e-4, logprob_bits=23)
SAMPLE = {"sample_id": "s", "prompt_token_ids": PROMPT, "token_ids": RESPONSE}


def positions(logps: np.ndarray, tokens: list[int], k: int) -> list[dict | None]:
    """`prompt_logprobs` as vLLM gives them: logps [len(tokens) - 1, V] predict tokens[1:]."""

    def entry(row: np.ndarray, i: int) -> dict:
        return {"logprob": max(float(row[i]), IMPOSSIBLE), "rank": 1 + int((row > row[i]).sum()), "decoded_token": "?"}

    return [None] + [
        {str(i): entry(row, i) for i in dict.fromkeys([token, *np.argsort(-row, kind="stable")[:k].tolist()])}
        for row, token in zip(logps, tokens[1:], strict=True)
    ]


@pytest.fixture
def logits() -> torch.Tensor:
    z = 3 * torch.randn((len(PROMPT + RESPONSE) - 1, V), generator=torch.Generator().manual_seed(0))
    z[-2, 5:] = -torch.inf  # a position with fewer possible tokens than K, whose own token is one of them
    z[-1, 12] = 20.0  # a sure one
    return z


def choice_of(logits: torch.Tensor) -> dict:
    tokens = PROMPT + RESPONSE
    return {
        "prompt_token_ids": tokens,
        "prompt_logprobs": positions(logits.double().log_softmax(-1).numpy(), tokens, K),
    }


def test_rows_are_those_of_the_transformers_engine(logits):
    row = _row(choice_of(logits), SAMPLE, V, K, SETTINGS)
    full = compress([logits[len(PROMPT) - 1 :].clone()], torch.tensor(RESPONSE), [len(RESPONSE)], ["s"], SETTINGS)
    assert row.schema == full.schema
    for column in ("sample_id", "head_counts", "tail_counts", "entry_gaps"):
        assert row[column].to_list() == full[column].to_list()
    for column in ("token_logprobs", "entry_logprobs"):
        assert row[column][0].to_list() == pytest.approx(full[column][0].to_list(), abs=1e-5)
    tails = [np.exp(frame["tail_logmass"][0].to_numpy()) for frame in (row, full)]
    assert tails[0] == pytest.approx(tails[1], abs=1e-6)
    counts = row["head_counts"][0].to_list()
    assert counts[-1] == 1 and counts[-2] == 5 and max(counts) == K


def test_columns_past_the_vocabulary_are_in_the_bucket(logits):
    t = targets(_row(choice_of(logits), SAMPLE, 38, K, SETTINGS.model_copy(update={"epsilon": 0.0})))
    assert int(t.ids.max()) < 38
    mass = (t.logprobs.double().exp() * t.is_top).sum(-1) + t.tail_logmass.double().exp()
    assert mass.numpy() == pytest.approx(1, abs=1e-5)


def _first(choice: dict) -> dict:
    return choice["prompt_logprobs"][len(PROMPT)]


SPOILS = {
    "another sequence": lambda c: c.update(prompt_token_ids=[1]),
    "no log-probs": lambda c: c.update(prompt_logprobs=None),
    "a position too few": lambda c: c["prompt_logprobs"].pop(),
    "an empty position": lambda c: c["prompt_logprobs"].__setitem__(len(PROMPT), None),
    "without its token": lambda c: _first(c).pop(str(RESPONSE[0])),
    "too few entries": lambda c: [_first(c).popitem() for _ in range(3)],
    "nan": lambda c: _first(c)[str(RESPONSE[0])].update(logprob=math.nan),
    "above 0": lambda c: _first(c)[str(RESPONSE[0])].update(logprob=0.7),
    "a mass of more than 1": lambda c: [e.update(logprob=-0.5) for e in _first(c).values()],
    "an entry without its log-prob": lambda c: _first(c)[str(RESPONSE[0])].pop("logprob"),
    "an id that is none": lambda c: _first(c).update({"x": _first(c).pop(next(i for i in _first(c) if i != "7"))}),
    "impossible alone": lambda c: [e.update(logprob=IMPOSSIBLE) for e in _first(c).values()],
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_wrong_answer_is_no_row(logits, spoil):
    choice = choice_of(logits)
    spoil(choice)
    with pytest.raises((BadAnswer, KeyError, ValueError)):  # what the client takes for a bad answer
        _row(choice, SAMPLE, V, K, SETTINGS)


class FakeScorer(FakeVllm):
    """A fake server whose log-probs are those of the tiny teacher."""

    def __init__(self, path):
        super().__init__(ids.model_id(path))
        self.llm = load_model(path, dtype="float32")
        self.salts = []  # of every attempt

    def begin(self, body: dict) -> str | None:
        self.salts.append(body["cache_salt"])
        return super().begin(body)

    def complete(self, body: dict) -> dict:
        if "prompt_logprobs" not in body:
            return super().complete(body)
        with torch.no_grad():
            logps = self.llm(torch.tensor([body["prompt"]])).logits[0, :-1].double().log_softmax(-1).numpy()
        return {"prompt_token_ids": body["prompt"],
                "prompt_logprobs": positions(logps, body["prompt"], body["prompt_logprobs"])}  # fmt: skip


def test_a_slice_is_scored_once_and_what_was_finished_before_a_failure_is_kept(run, tiny_models, monkeypatch):
    monkeypatch.setattr("nbg_core.vllm.client.PAUSE", tenacity.wait_fixed(0.01))
    monkeypatch.setattr("nbg_core.vllm.client.RETRY_SECONDS", 0.0)
    fake = FakeScorer(tiny_models.teacher)
    data = run.profile.model_dump() | {
        "teacher": {"engine": "vllm", "k_head": 16, "m_tail": 0, "min_weight": 0, "epsilon": 0},
        "training": {"loss": {"estimator": "bucket"}}, "vllm": {"addresses": [fake.url], "max_in_flight": 1},
    }  # fmt: skip
    own = Run(Profile.model_validate(data), run.lake, log=lambda line: None)
    fake.fault = lambda body, attempt: "500" if len(fake.asked) > 1 else None
    with pytest.raises(ServerFailed, match="status 500"):
        materialise(own, "a")
    fake.fault = lambda body, attempt: None
    report = materialise(own, "a")
    assert (report.rows, report.new_rows) == (3, 2)
    assert materialise(own, "a").new_rows == 0
    assert len(set(fake.salts)) == len(fake.salts) == 3 + 3  # nothing is found in a given server's prefix cache
    plain = run.profile.model_copy(update={
        "teacher": own.profile.teacher.model_copy(update={"engine": "transformers"})})  # fmt: skip
    other = materialise(Run(plain, run.lake, log=lambda line: None), "a")
    assert other.new_rows == 3 and other.storage_id != report.storage_id
    rows = run.lake.sql("SELECT * FROM teacher_logits ORDER BY sample_id")
    one, two = (targets(rows.filter(settings_id=r.storage_id)) for r in (report, other))
    assert one.ids.equal(two.ids) and one.is_top.equal(two.is_top) and not one.is_tail.any()
    assert one.logprobs.numpy() == pytest.approx(two.logprobs.numpy(), rel=2**-6, abs=1e-4)
    fake.stop()


def test_a_teacher_that_is_served_gives_the_score_of_its_log_probs(run, tiny_models):
    fake = FakeScorer(tiny_models.teacher)
    samples = run.lake.sql("SELECT *, NULL AS verifier, NULL AS answer, NULL AS verifier_args FROM samples")
    data = run.profile.model_dump() | {
        "preference": {"weights": {"teacher_loglik": 1.0}},
        "teacher": {"engine": "vllm", "k_head": 16, "m_tail": 0, "min_weight": 0},
        "training": {"loss": {"estimator": "bucket"}}, "vllm": {"addresses": [fake.url]},
    }  # fmt: skip
    served = Run(Profile.model_validate(data), run.lake, log=lambda line: None)
    plain = Run(Profile.model_validate(data | {"teacher": {"m_tail": 0}}), run.lake, log=lambda line: None)
    (one, new), (two, new_too) = (score_samples(r, "a", samples, []) for r in (served, plain))
    assert new == new_too == 4 and len(fake.asked) == 4
    assert one["teacher_loglik"]["score"].to_list() == pytest.approx(two["teacher_loglik"]["score"].to_list(), rel=1e-3)
    assert score_samples(served, "a", samples, [])[1] == 0
    fake.stop()
