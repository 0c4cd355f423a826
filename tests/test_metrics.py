"""A metric is one row of METRICS. Its sum over ranks, column and curve follow; one without a row is an error."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys

import polars as pl
import pytest
import torch

from nbg_core.config.profile import PROJECT_ROOT
from nbg_core.lake import tables
from nbg_core.losses import joint, metrics
from nbg_core.losses.joint import pair_loss, share_of_group
from nbg_core.losses.metrics import METRICS, Metric, check_metrics
from nbg_core.losses.settings import LossSettings

NAMES = [metric.name for metric in METRICS]


def test_a_step_with_a_metric_too_many_or_too_few_is_refused():
    check_metrics(NAMES)
    with pytest.raises(ValueError, match="does not declare: entropy; declared and not measured: none"):
        check_metrics([*NAMES, "entropy"])
    with pytest.raises(ValueError, match="does not declare: none; declared and not measured: nll"):
        check_metrics([n for n in NAMES if n != "nll"])


def test_rows_of_training_steps_with_another_metric_are_refused():
    row = {"training_id": "t", "step": 0, "materialisation_id": "m", **dict.fromkeys(NAMES, 1.0)}
    assert tables.validate("training_steps", pl.DataFrame([row])).height == 1
    with pytest.raises(ValueError, match="training_steps declares no column entropy.*nbg_core/losses/metrics.py"):
        tables.validate("training_steps", pl.DataFrame([row | {"entropy": 1.0}]))
    with pytest.raises(ValueError, match="the rows for table training_steps lack its columns nll"):
        tables.validate("training_steps", pl.DataFrame([row]).drop("nll"))


def test_a_sum_has_a_count_to_divide_it_by():
    with pytest.raises(ValueError, match="metric 'x' needs both `sum` and `mean_over`, or neither"):
        Metric("x", "", lambda t: t.kl.sum())
    with pytest.raises(ValueError, match="metric 'x' needs both `sum` and `mean_over`, or neither"):
        Metric("x", "", mean_over="pairs")


def test_a_group_adds_up_rows_and_shares_pairs_by_what_the_metric_says_not_by_its_name(monkeypatch):
    """Two ranks with the same two pairs and half of the rows each: added up, their shares are the sums of one rank."""
    added = (
        Metric("kl_of_pairs", "", lambda t: t.margin.sum(), "pairs"),
        Metric("tokens_near_the_teacher", "", lambda t: (t.kl < 1).double().sum(), "chosen_tokens", of="rows"),
    )
    monkeypatch.setattr(joint, "SUMMED", (*metrics.SUMMED, *added))
    torch.manual_seed(0)
    n = 12
    logps, kl, reference = torch.randn(n).double(), 2 * torch.rand(n).double(), torch.randn(n).double()
    pair_index, is_chosen = torch.arange(n) // 6, torch.arange(n) % 6 < 3
    counts = {"settings": LossSettings(), "denominators": joint.Denominators(2, 6, 6)}
    _, whole = pair_loss(logps, kl, pair_index, is_chosen, reference, 2, **counts)
    totals = joint.side_sums(logps, reference, pair_index, is_chosen, 2)
    ranks = []
    for rows in (slice(0, 5), slice(5, n)):
        arrays = [a[rows] for a in (logps, kl, pair_index, is_chosen, reference)]
        ranks.append(share_of_group(pair_loss(*arrays, 2, **counts, totals=totals)[1], 2))
    for metric in joint.SUMMED:
        torch.testing.assert_close(ranks[0][metric.name] + ranks[1][metric.name], whole[metric.name])


NEW_METRIC = """
import sys
from nbg_core.losses import metrics
metrics.METRICS += (metrics.Metric("entropy", "mean entropy, nats", plot="entropy"),)
metrics.PLOTS += ("entropy",)
import polars as pl
from nbg_core import assets
from nbg_core.config.load import load_profile
from nbg_core.lake.lake import Lake
from nbg_core.lake.records import Record, Write
from nbg_core.lake.tables import TABLES
lake = Lake(sys.argv[1], sys.argv[2])
lake.create()
assert TABLES["training_steps"].columns()["entropy"].description == "mean entropy, nats"
assert lake.sql("SELECT entropy FROM training_steps WHERE training_id = 'old'").rows() == [(None,)]
row = {"training_id": "new", "step": 0, **{m.name: 0.5 for m in metrics.METRICS}}
lake.commit(Record("student_checkpoint", None, "r", "t"), [Write("training_steps", pl.DataFrame([row]))])
from nbg_assets import plots
from nbg_assets.metadata import Made
asset = assets.get("student_checkpoint")
assert "entropy" in asset.plots
made = Made(asset, None, load_profile("embedded"), lake, {"training_id": "new"}, 0.0)
drawn = plots.PLOTS["entropy"](made)
assert drawn.alt == "entropy" and drawn.png.startswith(b"\\x89PNG")
print(lake.sql("SELECT training_id, entropy FROM training_steps ORDER BY training_id").rows())
"""


def test_a_new_metric_is_a_column_of_an_existing_lake_and_a_curve(tmp_path):
    """In a process of its own: the tables are made when their module is imported."""
    from nbg_core.lake.lake import Lake, Record, Write

    lake = Lake(f"sqlite:{tmp_path}/catalog.sqlite", str(tmp_path / "files"))
    lake.create()
    row = {"training_id": "old", "step": 0, **dict.fromkeys(NAMES, 1.0)}
    lake.commit(Record("student_checkpoint", None, "r", "t"), [Write("training_steps", pl.DataFrame([row]))])
    done = subprocess.run([sys.executable, "-c", NEW_METRIC, lake.catalog, lake.data_path], capture_output=True,
                          text=True, timeout=240, cwd=PROJECT_ROOT)  # fmt: skip
    assert done.stdout.strip() == "[('new', 0.5), ('old', None)]", done.stderr


def test_a_training_step_with_an_undeclared_metric_ends_the_training(monkeypatch):
    train = importlib.import_module("nbg_core.training.train")
    monkeypatch.setattr(metrics, "METRICS", tuple(m for m in METRICS if m.name != "data_wait"))

    class Engine:
        device = "cpu"

        def __call__(self, *_, **__):
            sums = {metric.name: torch.ones(()) for metric in metrics.SUMMED}
            return torch.ones(()), sums, None

    class Data:
        n_inputs, pad_id = pl.Series([1]).to_numpy(), None

        def denominators(self, pairs):
            return joint.Denominators(1, 1, 1)

    @dataclasses.dataclass
    class Step:
        index = 1
        pairs = pl.Series([0]).to_numpy()

    batch = type("Batch", (), {"to": lambda self, device: self})()
    monkeypatch.setattr(train, "_share", lambda *_: [Step.pairs])
    monkeypatch.setattr(train, "backward", lambda *_: None)
    monkeypatch.setattr(train, "take_step", lambda *_: 1.0)
    monkeypatch.setattr(train.dist, "all_reduce", lambda total: None)
    with pytest.raises(ValueError, match="does not declare: data_wait; declared"):
        train.train_step(Engine(), Data(), Step(), None, 0.1, iter([batch]))
