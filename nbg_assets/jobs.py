"""The two jobs: `refresh_slice` makes one slice ready for training, `train` trains on all slices and evaluates.

They are two because a Dagster run has either one partition or none."""

import dagster as dg

from nbg_core.assets import PARTITIONED, UNPARTITIONED

refresh_slice = dg.define_asset_job(
    "refresh_slice",
    selection=list(PARTITIONED),
    description="Queries, responses, pairs, teacher and reference of one slice; finished work is not repeated.",
)

train = dg.define_asset_job(
    "train",
    selection=list(UNPARTITIONED),
    description="Train the student on the pairs of all slices, then evaluate it on the held-out queries.",
)
