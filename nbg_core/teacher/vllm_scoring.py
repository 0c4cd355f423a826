"""Teacher rows from vLLM's `prompt_logprobs`, for a teacher that needs a whole node to itself.

A server gives the `k_head` most probable entries of a position and the token that is there, nothing else: the rows are
top-k with a bucket. The top entries kept are the fewest that leave at most `epsilon` outside, as with the transformers
engine. There is no sampled tail. The mass outside is 1 minus that of the top entries, in float64 but of float32
log-probs: exact to 1e-6 or so. The bucket estimator (training.loss.estimator) is the one that reads such rows. In
float32 both engines have the same entries but for ties, with log-probs within 0.001 (tests/test_real_vllm.py).

Columns past the tokenizer's vocabulary (a padded output matrix) are never entries; their mass is in the bucket.

Prefix caching. Log-probs of prompt tokens found in the cache were stale values of earlier requests in some versions
(vllm PR 42245), and are computed again in others, so a cache could only do harm: our server runs without one, and
every attempt at a request has a `cache_salt` of its own, so that a given server finds nothing in its.
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
"""What a server says for a log-prob of -inf, which JSON cannot."""
MASS_TOLERANCE = 1e-3
"""Mass past 1 that rounding explains."""


@contextmanager
def open_vllm(run: Run, path: Path) -> Iterator[Callable[[pl.DataFrame], Iterator[pl.DataFrame]]]:
    """What makes frames of teacher_logits columns, a response each, of `samples`, as answers come."""
    trust = run.profile.models.trust_remote_code
    vocab = len(load_tokenizer(path, trust_remote_code=trust))
    k = min(run.profile.teacher.k_head, output_width(path, trust_remote_code=trust))
    with served(run, path, prompt_logprobs=k) as client:
        yield lambda samples: score(client, samples, vocab, k, run.profile.teacher)


def score(client: Client, samples: pl.DataFrame, vocab: int, k: int, s: TeacherSettings) -> Iterator[pl.DataFrame]:
    """See open_vllm. Longest first; raises ServerFailed after what had finished was handed back."""
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
    """One response's row. Raises BadAnswer for what cannot be the log-probs of its tokens."""
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
        raise BadAnswer(f"a position without its token's log-prob, or not with {k} entries")
    ids = np.array([int(i) for i in position])
    logp = np.array([entry["logprob"] for entry in position.values()], dtype=np.float64)
    logp[logp <= IMPOSSIBLE] = -np.inf
    if np.isnan(logp).any() or logp.max() > MASS_TOLERANCE:
        raise BadAnswer("log-probs that are not numbers, or above 0")
    own = float(logp[ids == token][0])
    if len(ids) == k + 1:  # the token is there because it was asked about: not one of the k most probable
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
