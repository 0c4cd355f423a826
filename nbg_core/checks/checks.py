"""The checks that a partition must pass once it is made. A check is one row of CHECKS; an asset lists its checks by
name (`Asset.checks`).

When a *blocking* check fails, Dagster stops the run that made the partition, and no later step starts that would read
the partition: every Dagster step calls `broken_upstream` first. A worker that is started by hand does not. Other checks
only warn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from nbg_core import assets
from nbg_core.base.names import find
from nbg_core.checks import training_violations as tv
from nbg_core.checks import violations as v
from nbg_core.checks.violations import Subject
from nbg_core.config.profile import Profile
from nbg_core.config.slices import slice_names
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import latest_materialisation
from nbg_core.reference import drift
from nbg_core.vllm.environment import missing_environment


@dataclass(frozen=True)
class Check:
    name: str
    description: str
    """What holds when the check passes."""
    violations: Callable[[Subject], pl.DataFrame]
    """Returns the rows that break the rule; none if the check passes. If they have a column `why`, its first value is
    shown beside the description."""
    blocking: bool = True


CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        # queries
        Check("no_train_eval_overlap", "no training query has the text of a held-out one, in any slice that has a file",
              v.train_eval_overlap),
        Check("has_training_queries", "the slice has at least one training query", v.no_rows_of_split("train")),
        Check("has_held_out_queries", "the slice has at least one held-out query", v.no_rows_of_split("eval"),
              blocking=False),
        # student_samples
        Check("every_query_answered", "every training query has as many responses as were asked for",
              v.too_few_responses),
        Check("tokens_in_vocabulary", "responses have tokens, one log-prob per token, and no id outside the vocabulary",
              v.outside_vocabulary),
        Check("few_truncated", f"at most {v.WARN_SHARE:.0%} of the responses are truncated",
              v.share_of_responses("finish_reason = 'length'"), blocking=False),
        Check("few_empty", f"at most {v.WARN_SHARE:.0%} of the responses have no text",
              v.share_of_responses("trim(text) = ''"), blocking=False),
        # filtered_pairs
        Check("has_pairs", "the slice has at least one pair", v.no_pairs),
        Check("margins_wide_enough", "every margin is the difference of the scores and at least min_margin",
              v.narrow_margins),
        Check("responses_exist", "both responses of a pair exist and answer its query", v.unknown_responses),
        Check("no_truncated_positive", "no chosen response is truncated, unless the profile allows it",
              v.truncated_positives),
        Check("no_held_out_query", "no pair comes from a held-out query", v.held_out_pairs),
        # teacher_logits, reference_logprobs
        Check("one_row_per_response", "every response of a pair has exactly one row of this model and these settings",
              v.not_scored_once),
        Check("lengths_match", "all lists of a row fit the length of its response; no log-prob is above 0",
              v.wrong_lengths),
        Check("mass_is_one", f"top entries and tail sum to 1 at every position ({v.MASS_SAMPLE} responses)",
              v.mass_not_one),
        Check("sampler_agrees", f"at most {drift.MAX_SHARE:.0%} of the tokens that the reference drew have a sampler's "
              f"log-prob more than {drift.BOUND} nats from the reference's", v.drifted, blocking=False),
        # student_checkpoint
        Check("starts_at_reference", "before the first step the margin is 0, and the DPO loss is that of margin 0 "
              "(log 2 for sigmoid)", tv.not_reference_at_step_0),
        Check("weights_intact", "the checkpoint's weights exist and hash to its id", tv.weights_missing),
        Check("training_set_known", "every pair that was trained on is in the lake at the training's snapshot",
              tv.training_set_lost),
        # student_eval
        Check("better_than_before",
              "the promotion gate: significantly better overall and significantly worse on no slice",
              tv.gate_refuses, blocking=False),
    )
}  # fmt: skip


def checks_of(asset: str) -> list[Check]:
    """The checks of an asset, in the order of `Asset.checks`."""
    return [find(CHECKS, name, "check") for name in assets.get(asset).checks]


def cannot_run(profile: Profile) -> list[str]:
    """Why a valid profile cannot run on this machine, one sentence per reason."""
    models = {"student": profile.models.student, "teacher": profile.models.teacher}
    missing = [
        f"models.{role}: no model at {profile.resolve(path)} (a folder with config.json)"
        for role, path in models.items()
        if not (profile.resolve(path) / "config.json").is_file()
    ]
    return [*filter(None, [missing_environment(profile)]), *missing]


def broken_upstream(lake: Lake, profile: Profile, asset: str, slice_name: str | None) -> str | None:
    """A sentence on the first blocking check that an upstream partition of `asset` fails; None when all pass."""
    for upstream, upstream_slice in assets.upstream_partitions(asset, slice_name, slice_names(profile)):
        if latest_materialisation(lake, upstream, upstream_slice) is None:
            continue  # the stage reports a missing partition itself
        subject = Subject(lake, profile, upstream, upstream_slice)
        for check in checks_of(upstream):
            if check.blocking and (n := check.violations(subject).height):
                name = assets.partition_name(upstream, upstream_slice)
                return (
                    f"{name} fails its check {check.name} ({n} violations): {check.description}; the UI shows the "
                    "rows, and docs/operations.md (Checks) says what to do"
                )
    return None
