"""What the ranks of a training need to know, as one JSON file: `launcher.launch` writes it, and `train` reads it."""

from __future__ import annotations

from pathlib import Path

from nbg_core.base.section import Section
from nbg_core.config.training import TrainingSettings

ASSET = "student_checkpoint"
TIED_TO_STDIN = "NBG_TRAINING_TIED_TO_STDIN"
"""Environment variable. If it is set, stdin of the ranks is a pipe from the worker, and they end when it closes: the
worker is gone then."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message names the place, the value and the remedy."""


class TrainingRequest(Section):
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
    """Slices whose pairs are trained on."""
    policy_id: str
    """Model id of the policy: training starts from it, and it is the reference of the DPO term."""
    policy_path: Path
    """Folder of that model."""
    teacher_id: str
    """Model id of the teacher whose stored distributions are used."""
    storage_id: str
    """`identity.storage_id` of these distributions."""
    scoring_id: str
    """`identity.scoring_id` of the reference log-probs that are used."""
    temperature: float
    """Temperature of the stored teacher distributions (teacher.temperature)."""
    training: TrainingSettings
    """The training settings."""
    work: Path
    """Folder for metrics, resumable states and the result; on several machines, one that all of them see."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder."""
    threads: int | None = None
    """CPU threads of all ranks of a machine together; None leaves it to torch."""

    @property
    def steps_file(self) -> Path:
        """Metrics of finished steps, one JSON object per line."""
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
        """Folder of the trained model; it exists only when it is complete."""
        return self.work / "final"

    @property
    def error_file(self) -> Path:
        """The error of the rank that failed first, if training failed."""
        return self.work / "error.json"
