"""What must hold of a partition once it is made.

A *blocking* check stops what comes next: the run that made the partition (Dagster), and any later run that would read
it (`broken_upstream`, asked before every stage). The others warn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from nbg_core import drift, lineage
from nbg_core import violations as v
from nbg_core.config import Profile
from nbg_core.lake import Lake
from nbg_core.violations import Subject
from nbg_core.vllm.environment import missing_environment


@dataclass(frozen=True)
class Check:
    """`violations` returns a frame that is empty when all is well."""

    name: str
    description: str
    violations: Callable[[Subject], pl.DataFrame]
    blocking: bool = True


def cannot_run(profile: Profile) -> list[str]:
    """What stands in the way of running a valid profile on this machine, a sentence each."""
    models = {"student": profile.models.student, "teacher": profile.models.teacher}
    missing = [
        f"models.{role}: no model at {profile.resolve(path)} (a folder with config.json)"
        for role, path in models.items()
        if not (profile.resolve(path) / "config.json").is_file()
    ]
    return [*filter(None, [missing_environment(profile)]), *missing]


def broken_upstream(lake: Lake, profile: Profile, asset: str, slice: str | None) -> str | None:
    """The first blocking check that an upstream partition of `asset` fails, as a sentence, or None."""
    for upstream in lineage.UPSTREAM[asset]:
        many = upstream not in lineage.UNPARTITIONED and slice is None
        for part in lineage.slices(profile) if many else [None if upstream in lineage.UNPARTITIONED else slice]:
            if lineage.latest(lake, upstream, part) is None:
                continue  # the stage itself says that it is missing
            subject = Subject(lake, profile, part)
            for check in CHECKS[upstream]:
                if check.blocking and (n := check.violations(subject).height):
                    name = upstream + (f"[{part}]" if part else "")
                    return f"{name} fails its check {check.name} ({n} violations): {check.description}"
    return None


CHECKS: dict[str, tuple[Check, ...]] = {
    "queries": (
        Check("no_train_eval_overlap", "no training query has the text of a held-out one, in any slice that has a file",
              v.train_eval_overlap),
        Check("has_training_queries", "the slice has at least one training query", v.no_rows_of_split("train")),
        Check("has_held_out_queries", "the slice has at least one held-out query", v.no_rows_of_split("eval"),
              blocking=False),
    ),
    "student_samples": (
        Check("every_query_answered", "every training query has as many responses as were asked for",
              v.too_few_responses),
        Check("tokens_in_vocabulary", "responses are not empty, have a log-prob per token, and ids the model knows",
              v.outside_vocabulary),
        Check("few_truncated", f"at most {v.WARN_SHARE:.0%} of the responses are truncated",
              v.share_of_responses("finish_reason = 'length'"), blocking=False),
        Check("few_empty", f"at most {v.WARN_SHARE:.0%} of the responses have no text",
              v.share_of_responses("trim(text) = ''"), blocking=False),
    ),
    "filtered_pairs": (
        Check("has_pairs", "the slice has at least one pair", v.no_pairs),
        Check("margins_wide_enough", "every margin is chosen - rejected and at least min_margin", v.narrow_margins),
        Check("responses_exist", "both responses of a pair exist and answer its query", v.unknown_responses),
        Check("no_truncated_positive", "no chosen response is truncated, unless the profile allows it",
              v.truncated_positives),
        Check("no_held_out_query", "no pair comes from a held-out query", v.held_out_pairs),
    ),
    "teacher_logits": (
        Check("one_row_per_response", "every response of a pair has exactly one row of this teacher and these settings",
              v.not_scored_once("teacher_logits")),
        Check("lengths_match", "every list has one item per response token, no log-prob is above 0",
              v.wrong_lengths("teacher_logits")),
        Check("mass_is_one", f"head and tail sum to 1 at every position ({v.MASS_SAMPLE} responses)", v.mass_not_one),
    ),
    "reference_logprobs": (
        Check("one_row_per_response", "every response of a pair has exactly one row of this reference",
              v.not_scored_once("reference_logprobs")),
        Check("lengths_match", "one log-prob per response token, none above 0", v.wrong_lengths("reference_logprobs")),
        Check("sampler_agrees", f"at most {drift.MAX_SHARE:.0%} of the tokens that the reference drew have a sampler's "
              f"log-prob more than {drift.BOUND} nats from the reference's", v.drifted, blocking=False),
    ),
    "student_checkpoint": (
        Check("starts_at_reference", "before the first step the margin is 0 and the DPO loss log 2",
              v.not_reference_at_step_0),
        Check("weights_intact", "the weights are there and hash to the checkpoint's id", v.weights_missing),
        Check("training_set_known", "every pair trained on is in the lake at the snapshot read", v.training_set_lost),
    ),
    "student_eval": (
        Check("better_than_before", "the promotion gate: better overall and no slice worse, beyond noise",
              v.gate_refuses, blocking=False),
    ),
}  # fmt: skip
