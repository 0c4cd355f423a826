"""What a stage gets to work with: profile, lake, run id, and a way to say how far it is; and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nbg_core.assets import settings_of, upstream_partitions
from nbg_core.base.progress import Progress
from nbg_core.config import identity
from nbg_core.config.profile import Profile
from nbg_core.config.slices import slice_names
from nbg_core.lake.lake import Commit, Input, Lake, Record, Write
from nbg_core.lake.queries import input_of
from nbg_core.lineage.policy import Policy, current_policy


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a stage says of the partition that it has made. Each stage adds fields of its own, by a subclass.

    Every field is shown in Dagster under its name, so a value that is not declared is an error (TypeError) where the
    report is made."""

    asset: str
    slice: str | None
    snapshot: int
    """Lake snapshot of the commit that completed the partition."""
    data_version: str
    """Digest of the partition's content."""
    rows: int
    """Rows of the partition."""
    new_rows: int
    """Rows that this run made; 0 when everything was there."""

    @classmethod
    def of(cls, commit: Commit, asset: str, slice_name: str | None, data_version: str, **values: Any):
        """The report of a partition that `commit` has completed."""
        return cls(asset=asset, slice=slice_name, snapshot=commit.snapshot, data_version=data_version, **values)


@dataclass
class Run:
    profile: Profile
    lake: Lake
    run_id: str = "local"
    log: Callable[[str], None] = print
    policy: Policy = field(init=False)

    def __post_init__(self):
        self.policy = current_policy(self.lake, self.profile)

    def settings(self, asset: str, slice_name: str | None) -> dict:
        """See `assets.settings_of`."""
        return settings_of(asset, self.profile, self.policy.model_id, slice_name)

    def read_upstream(self, asset: str, slice_name: str | None) -> tuple[int, list[Input]]:
        """The snapshot to read at, and the input records of the asset's upstream partitions as of it.

        Raises LookupError if one was never materialised."""
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
        """Commit `writes` with their lineage. With a `data_version` the partition is complete; without, it is a
        chunk: work that a later run finds and does not do again."""
        settings = self.settings(asset, slice_name)
        record = Record(
            asset=asset, slice_name=slice_name, run_id=self.run_id, profile=self.profile.name,
            status="chunk" if data_version is None else "complete", settings=settings,
            settings_id=identity.settings_id(settings), inputs=list(inputs), data_version=data_version,
        )  # fmt: skip
        return self.lake.commit(record, list(writes))

    def progress(self, what: str, total: int) -> Progress:
        return Progress(what, total, self.log)
