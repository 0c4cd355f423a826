"""Asset `reference_logprobs`, table `reference_logprobs`: the reference's log-probs of every response in a pair.

The reference is the model that training starts from: the SFT student in the first round, the promoted checkpoint later.
So the margin of every pair is 0 before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from nbg_core.base.ids import content_version
from nbg_core.config import identity
from nbg_core.lake.queries import samples_of_pairs, scored_samples
from nbg_core.lake.records import Write
from nbg_core.lineage.run import Report, Run
from nbg_core.modeling.scoring import response_logprobs
from nbg_core.reference import drift

ASSET = "reference_logprobs"


@dataclass(frozen=True, kw_only=True)
class ReferenceReport(Report):
    reference_model_id: str
    """Model id of the reference."""
    compared_tokens: int
    """Tokens that the reference itself drew; the sampler's log-probs of these are compared with the reference's."""
    sampler_drift_mean: float | None
    """Mean difference, nats per token. This field and the next two are None when nothing was compared."""
    sampler_drift_max: float | None
    """Largest difference of one token, nats."""
    sampler_drift_share: float | None
    """Share of tokens whose difference is more than `drift.BOUND`."""


def materialise(run: Run, slice_name: str) -> ReferenceReport:
    """Score the responses that have no row for this reference and dtype yet, with a commit after each chunk."""
    snapshot, inputs = run.read_upstream(ASSET, slice_name)
    wanted = samples_of_pairs(run.lake, slice_name, snapshot)
    reference_id, scoring_id = run.policy.model_id, identity.scoring_id(run.profile)
    done = scored_samples(run.lake, ASSET, reference_id, scoring_id, wanted["sample_id"].to_list())
    missing = wanted.join(done, on="sample_id", how="anti", maintain_order="left")
    run.log(f"{ASSET}[{slice_name}]: {wanted.height - missing.height} of {wanted.height} responses already scored")
    new_rows = 0
    for chunk in response_logprobs(run, run.policy.path, missing, f"{ASSET}[{slice_name}]"):
        rows = chunk.with_columns(
            slice=pl.lit(slice_name), model_id=pl.lit(reference_id), settings_id=pl.lit(scoring_id)
        )
        new_rows += run.commit(ASSET, slice_name, [Write(ASSET, rows)], inputs=inputs).n_rows
    version = content_version([f"{sample_id}:{reference_id}:{scoring_id}" for sample_id in wanted["sample_id"]])
    commit = run.commit(ASSET, slice_name, inputs=inputs, data_version=version)
    return ReferenceReport.of(
        commit, ASSET, slice_name, version, rows=wanted.height, new_rows=new_rows, reference_model_id=reference_id,
        **drift.summary(run.lake, slice_name),
    )  # fmt: skip
