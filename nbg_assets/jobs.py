"""Two jobs, because a run has one partition or none: `refresh_slice` makes a slice ready for training, `train` trains
on all slices and evaluates."""

import dagster as dg

from nbg_core.assets import PARTITIONED, UNPARTITIONED

refresh_slice = dg.define_asset_job(
    "refresh_slice",
    selection=list(PARTITIONED),
    description="Queries, responses, pairs, teacher and reference of one slice; finished work is not done again.",
)

train = dg.define_asset_job(
    "train",
    selection=list(UNPARTITIONED),
    description="Train the student on the pairs of all slices, then evaluate it on the held-out queries.",
)
