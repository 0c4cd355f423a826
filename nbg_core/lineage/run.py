"""What every stage takes (`Run`: profile, lake, policy, log) and returns (`Report`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nbg_core.assets import settings_of, upstream_partitions
from nbg_core.base.progress import Progress
from nbg_core.config import identity
from nbg_core.config.profile import Profile
from nbg_core.config.slices import slice_names
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import input_of
from nbg_core.lake.records import Commit, Input, Record, Write
from nbg_core.lineage.policy import Policy, current_policy


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a stage reports about the partition that it made. A stage adds fields of its own in a subclass.

    Dagster shows every field under its name. A value without a declared field is a TypeError when the report is made.
    """

    asset: str
    slice: str | None
    snapshot: int
    """Lake snapshot of the commit that completed the partition."""
    data_version: str
    """Digest of the partition's content."""
    rows: int
    """Rows of the partition."""
    new_rows: int
    """Rows that this run added; 0 if all were there already."""

    @classmethod
    def of(cls, commit: Commit, asset: str, slice_name: str | None, data_version: str, **values: Any):
        """The report of a partition that `commit` has completed; `values` are the fields not given otherwise."""
        return cls(asset=asset, slice=slice_name, snapshot=commit.snapshot, data_version=data_version, **values)


@dataclass
class Run:
    """One run of a stage: its profile, lake and policy, and how it reads, commits and logs."""

    profile: Profile
    lake: Lake
    run_id: str = "local"
    """Dagster's run id; recorded with every commit."""
    log: Callable[[str], None] = print
    policy: Policy = field(init=False)
    """The current policy when the run starts."""

    def __post_init__(self):
        self.policy = current_policy(self.lake, self.profile)

    def settings(self, asset: str, slice_name: str | None) -> dict:
        """`assets.settings_of` for this run's profile and policy, both of which are fixed.

        Settings that come from files can change during a run: the ids of model folders and of the query file. The stage
        `queries` checks that its file did not change."""
        return settings_of(asset, self.profile, self.policy.model_id, slice_name)

    def read_upstream(self, asset: str, slice_name: str | None) -> tuple[int, list[Input]]:
        """The newest snapshot, and for each upstream partition the record of its content at that snapshot.

        Raises LookupError if one of them was never materialised."""
        snapshot = self.lake.snapshot()
        partitions = upstream_partitions(asset, slice_name, slice_names(self.profile))
        return snapshot, [input_of(self.lake, *partition, snapshot) for partition in partitions]

    def commit(
        self,
        asset: str,
        slice_name: str | None,
        writes: Iterable[Write] = (),
        *,
        inputs: Iterable[Input] = (),
        data_version: str | None = None,
    ) -> Commit:
        """Commit `writes` together with their lineage. With a `data_version` the commit completes the partition.
        Without one it stores a chunk of finished work, which a later run finds and does not repeat."""
        settings = self.settings(asset, slice_name)
        record = Record(
            asset=asset, slice_name=slice_name, run_id=self.run_id, profile=self.profile.name,
            status="chunk" if data_version is None else "complete", settings=settings,
            settings_id=identity.settings_id(settings), inputs=list(inputs), data_version=data_version,
        )  # fmt: skip
        return self.lake.commit(record, list(writes))

    def progress(self, what: str, total: int) -> Progress:
        """Progress over `total` items, logged under the name `what`."""
        return Progress(what, total, self.log)
