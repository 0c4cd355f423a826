"""Held-out accuracy after DPO alone, KL alone and the joint loss: `.venv/bin/python benchmarks/loss_terms.py`.

For each seed the embedded pipeline samples, filters and scores once, in a lake of its own; then each loss trains on the
same pairs. The last row trains the joint loss on the teacher's whole distribution: all tokens are stored as top
entries, instead of the usual top entries and sampled tail. Results go to results/loss_terms.json and a section of
README.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import polars as pl
import report

from nbg_core.config.load import load_profile
from nbg_core.config.profile import Profile
from nbg_core.evaluation.accuracy import latest_summary
from nbg_core.lake.lake import Lake
from nbg_core.lineage import staleness
from nbg_core.runtime.worker import materialise

TERMS = {
    "DPO alone": {"w_dpo": 1.0, "w_pos": 0.0, "w_neg": 0.0},
    "KL alone": {"w_dpo": 0.0, "w_pos": 1.0, "w_neg": 1.0},
    "joint": {"w_dpo": 1.0, "w_pos": 1.0, "w_neg": 1.0},
}
WHOLE = {"k_head": 1000, "m_tail": 1, "epsilon": 0.0, "min_weight": 0.0, "logprob_bits": 23}
"""Settings of `teacher` that store all 260 tokens of the embedded models."""
RUNS = {name: (terms, {}) for name, terms in TERMS.items()} | {"joint, whole distribution": (TERMS["joint"], WHOLE)}


def profile_for(seed: int, terms: dict[str, float], teacher: dict, folder: Path) -> Profile:
    """The embedded profile with this seed, these weights of the loss and teacher settings, and a lake in `folder`."""
    base = load_profile("embedded").model_dump(mode="json")
    base["sampling"]["seed"] = base["training"]["seed"] = seed
    base["training"]["loss"] |= terms
    base["teacher"] |= teacher
    base["paths"] |= {"checkpoints": str(folder / "checkpoints"), "work": str(folder / "work")}
    base["lake"] |= {"catalog": f"sqlite:{folder}/catalog.sqlite", "data_path": str(folder / "files")}
    return Profile.model_validate(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for name, (terms, teacher) in RUNS.items():
                profile = profile_for(seed, terms, teacher, Path(folder))
                for status in staleness.status(Lake.of(profile), profile):
                    if status.state != "fresh":
                        materialise(status.asset, status.slice_name, "benchmark", profile)
                summary = latest_summary(Lake.of(profile)).summary
                rows += [{"seed": seed, "terms": name, **row} for row in summary.to_dicts()]
                print(pl.DataFrame(rows).filter(pl.col("is_overall")).select("seed", "terms", "after"), flush=True)
    report.write("loss_terms", rows, table(pl.DataFrame(rows)), report.machine("deepspeed"))


def table(rows: pl.DataFrame) -> str:
    """A Markdown table of the accuracy per slice: mean over the seeds, lowest and highest."""
    lines = ["| terms | slice | before | after: mean (lowest to highest seed) |", "|---|---|---|---|"]
    for (terms, name), g in rows.group_by("terms", "slice", maintain_order=True):
        after = g["after"]
        spread = f"{after.mean():.1%} ({after.min():.1%} to {after.max():.1%})"
        lines.append(f"| {terms} | {name} | {g['before'].mean():.1%} | {spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
