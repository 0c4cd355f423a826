"""`reference_logprobs`: the frozen policy's log-probabilities of every response in a pair.

The reference is the model that training starts from (the SFT student in the first round, the promoted checkpoint
later), so the margin before the first step is 0 for every pair.
"""

from __future__ import annotations

import polars as pl

from nbg_core import drift
from nbg_core.ids import content_version
from nbg_core.lake import Write
from nbg_core.run import Run
from nbg_core.teacher.forward import response_logprobs, samples_of_pairs

ASSET = "reference_logprobs"


def materialise(run: Run, slice: str) -> dict:
    """Score the responses that have no row for this reference and dtype yet; a chunk per commit."""
    snapshot, inputs = run.read("filtered_pairs", slice=slice)
    wanted = samples_of_pairs(run, slice, snapshot)
    reference, scoring = run.policy.model_id, run.profile.scoring_id()
    done = run.lake.sql(
        "SELECT sample_id FROM reference_logprobs WHERE model_id = ? AND settings_id = ? "
        "AND sample_id IN (SELECT unnest(?::VARCHAR[]))",
        [reference, scoring, wanted["sample_id"].to_list()],
    )
    missing = wanted.join(done, on="sample_id", how="anti", maintain_order="left")
    run.log(f"{ASSET}[{slice}]: {wanted.height - missing.height} of {wanted.height} responses already scored")
    new_rows = 0
    for chunk in response_logprobs(run, run.policy.path, missing, f"{ASSET}[{slice}]"):
        rows = chunk.with_columns(slice=pl.lit(slice), model_id=pl.lit(reference), settings_id=pl.lit(scoring))
        new_rows += run.commit(ASSET, slice, [Write(ASSET, rows)], inputs=inputs).n_rows
    version = content_version([f"{s}:{reference}:{scoring}" for s in wanted["sample_id"]])
    done = run.commit(ASSET, slice, inputs=inputs, data_version=version)
    return {
        **drift.summary(run.lake, slice),
        "asset": ASSET, "slice": slice, "snapshot": done.snapshot, "data_version": version, "rows": wanted.height,
        "new_rows": new_rows, "reference_model_id": reference,
    }  # fmt: skip
