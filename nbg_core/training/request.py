"""What the launched training needs to know, as one JSON file: written by `launch`, read by every rank."""

from __future__ import annotations

from pathlib import Path

from nbg_core.base.section import Section
from nbg_core.config.training import TrainingSettings

ASSET = "student_checkpoint"
TIED_TO_STDIN = "NBG_TRAINING_TIED_TO_STDIN"
"""Environment variable: the ranks' stdin is a pipe from the worker; when it closes the worker is gone, and they end."""


class TrainingError(RuntimeError):
    """Training cannot go on: names the place, the value and the remedy."""


class Request(Section):
    """One training. Everything that decides the result is here or in the lake at `snapshot`."""

    training_id: str
    """Digest of what decides the result."""
    catalog: str
    """Lake catalog, as `Lake` takes it."""
    data_path: str
    """Lake data path."""
    snapshot: int
    """Lake snapshot that the training set is read at."""
    slices: list[str]
    """Partitions whose pairs are trained on."""
    policy_id: str
    """Model to start from, and reference of the DPO term."""
    policy_path: Path
    """Its folder."""
    teacher_id: str
    """Teacher whose stored distributions are used."""
    storage_id: str
    """Settings that the distributions were stored with."""
    scoring_id: str
    """Settings that the reference log-probs were made with."""
    temperature: float
    """Temperature of the stored teacher distributions (teacher.temperature)."""
    training: TrainingSettings
    """The training settings."""
    work: Path
    """Folder for metrics, resumable states and the result; on several machines, one that all of them see."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder."""
    threads: int | None = None
    """CPU threads of all ranks of a machine together; none leaves it to torch."""

    @property
    def steps_file(self) -> Path:
        """Metrics of finished steps, a JSON object a line."""
        return self.work / "steps.jsonl"

    @property
    def rows_path(self) -> Path:
        """Folder of the training set's files (see `pair_files`)."""
        return self.work / "rows"

    @property
    def states(self) -> Path:
        """Folder of resumable states."""
        return self.work / "states"

    @property
    def final(self) -> Path:
        """The trained model; there only when it is complete."""
        return self.work / "final"

    @property
    def error_file(self) -> Path:
        """The first rank's error, if training failed."""
        return self.work / "error.json"
