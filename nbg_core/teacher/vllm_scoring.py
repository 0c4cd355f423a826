"""Teacher rows from vLLM's `prompt_logprobs`, for a teacher that needs a whole node to itself.

A server returns the `k_head` most probable tokens of a position and the token of the response, nothing else. So rows
have top entries and the mass outside them, but no tail samples, and training.loss.estimator must be `bucket`. As with
the transformers engine, the top entries are the fewest that leave at most `epsilon` outside. The mass outside is 1
minus that of the top entries, computed in float64 from float32 log-probs: accurate to about 1e-6. In float32 both
engines have the same entries, except for ties, with log-probs within 0.001 (tests/test_real_vllm.py).

Logits past the tokenizer's vocabulary (a padded output matrix) are never entries; their mass counts as outside.

Prefix caching. In some versions the log-probs of cached prompt tokens are stale values of earlier requests (vllm PR
42245); in others they are computed again. So a cache never helps: a server that a stage starts runs without one, and
each attempt at a request has its own `cache_salt`, so that servers of `vllm.addresses` do not use theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl

from nbg_core.config.profile import TeacherSettings
from nbg_core.lineage.run import Run
from nbg_core.modeling.loading import load_tokenizer, output_width
from nbg_core.teacher.store import frame
from nbg_core.vllm.client import BadAnswer, Client
from nbg_core.vllm.server import served

IMPOSSIBLE = -9999.0
"""What a server writes for a log-prob of -inf, which JSON does not have."""
MASS_TOLERANCE = 1e-3
"""The entries' mass may exceed 1, and a log-prob 0, by this much: that is rounding."""


@contextmanager
def open_vllm(run: Run, path: Path) -> Iterator[Callable[[pl.DataFrame], Iterator[pl.DataFrame]]]:
    """Open the teacher on vLLM servers: a function from `samples` to frames of teacher_logits columns.

    A frame has one response, and frames come in the order in which answers arrive."""
    trust = run.profile.models.trust_remote_code
    vocab = len(load_tokenizer(path, trust_remote_code=trust))
    k = min(run.profile.teacher.k_head, output_width(path, trust_remote_code=trust))
    with served(run, path, prompt_logprobs=k) as client:
        yield lambda samples: score(client, samples, vocab, k, run.profile.teacher)


def score(client: Client, samples: pl.DataFrame, vocab: int, k: int, s: TeacherSettings) -> Iterator[pl.DataFrame]:
    """The function of `open_vllm`. Longest responses first; ServerFailed is raised after finished ones were yielded."""
    n = pl.col("prompt_token_ids").list.len() + pl.col("token_ids").list.len()
    rows = samples.sort(n, "sample_id", descending=[True, False]).to_dicts()
    bodies = (
        {"prompt": r["prompt_token_ids"] + r["token_ids"], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k,
         "return_token_ids": True}
        for r in rows
    )  # fmt: skip
    answers = client.complete(bodies, lambda i, choice: _row(choice, rows[i], vocab, k, s), cached=False)
    yield from (row for _, row in answers)


def _row(choice: dict, sample: dict, vocab: int, k: int, s: TeacherSettings) -> pl.DataFrame:
    """The row of one response. Raises BadAnswer for an answer that cannot be the log-probs of its tokens."""
    prompt, response = sample["prompt_token_ids"], sample["token_ids"]
    if choice.get("prompt_token_ids") != prompt + response:
        raise BadAnswer("its prompt_token_ids are not those that were sent")
    positions = choice.get("prompt_logprobs") or []
    if len(positions) != len(prompt) + len(response):
        raise BadAnswer(f"log-probs of {len(positions)} positions for {len(prompt) + len(response)} tokens")
    entries = [_entries(p, t, vocab, k, s) for p, t in zip(positions[len(prompt) :], response, strict=True)]
    token, tail, ids, logprobs = zip(*entries, strict=True)
    return frame(
        [sample["sample_id"]], [len(response)], np.array(token, dtype=np.float32), np.array(tail, dtype=np.float32),
        np.array([len(i) for i in ids]), np.zeros(len(ids), dtype=np.int64), np.concatenate(ids),
        np.concatenate(logprobs).astype(np.float32), logprob_bits=s.logprob_bits,
    )  # fmt: skip


def _entries(position: dict, token: int, vocab: int, k: int, s: TeacherSettings):
    """The token's log-prob, the log mass outside the top entries, and its ids and log-probs, sorted by id."""
    if not isinstance(position, dict) or str(token) not in position or not k <= len(position) <= k + 1:
        raise BadAnswer(f"a position has no log-prob of its token, or not {k} entries")
    ids = np.array([int(i) for i in position])
    logp = np.array([entry["logprob"] for entry in position.values()], dtype=np.float64)
    logp[logp <= IMPOSSIBLE] = -np.inf
    if np.isnan(logp).any() or logp.max() > MASS_TOLERANCE:
        raise BadAnswer("log-probs that are not numbers, or above 0")
    own = float(logp[ids == token][0])
    if len(ids) == k + 1:  # the response's token is not one of the k most probable
        ids, logp = ids[ids != token], logp[ids != token]
    ids, logp = ids[(ids < vocab) & (logp > -np.inf)], logp[(ids < vocab) & (logp > -np.inf)]
    order = np.lexsort((ids, -logp))  # most probable first
    outside = 1 - np.exp(logp[order]).cumsum()
    if not len(order) or outside[-1] < -MASS_TOLERANCE:
        raise BadAnswer(f"{len(order)} entries with a mass of {1 - outside[-1] if len(order) else 0:.4f}")
    enough = outside <= s.epsilon
    n = int(enough.argmax()) + 1 if enough.any() else len(order)
    tail = math.log(outside[n - 1]) if outside[n - 1] > 0 else -math.inf
    kept = order[:n][np.argsort(ids[order[:n]])]
    return min(own, 0.0), tail, ids[kept], np.minimum(logp[kept], 0.0)
