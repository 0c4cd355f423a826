"""What is stored of the teacher's distribution: one row of TEACHER_COLUMNS per list column of `teacher_logits`.

What follows from a row: the column and its description, its encoding in Parquet, the condition that all lists of a
stored response have their length, and whether training reads it. `teacher.store` computes the values and reads them
back (`frame`, `decode`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

GAP_ZERO = 1 << 23
"""What `entry_gaps` holds for 0: a float32 from here on has a whole number's bytes in its last three."""


@dataclass(frozen=True)
class TeacherColumn:
    name: str
    meaning: str
    dtype: type[np.int32] | type[np.float32]
    per: Literal["position", "entry"]
    """Whether the list has an item per response position, or per stored entry of all positions, concatenated."""
    byte_split: bool = False
    """Stored byte by byte (`base.files.write_parquet`), which is small where some bytes are mostly equal."""
    may_be_inf: bool = False
    trained_on: bool = True
    """Whether training reads it."""


TEACHER_COLUMNS: tuple[TeacherColumn, ...] = (
    TeacherColumn("token_logprobs",
                  "teacher log-probability of the response token itself, at teacher.temperature, nats",
                  np.float32, "position", byte_split=True, may_be_inf=True, trained_on=False),
    TeacherColumn("tail_logmass",
                  "log of the mass outside the top entries, known exactly and kept to 1e-4 of itself; -inf when none",
                  np.float32, "position", byte_split=True, may_be_inf=True),
    TeacherColumn("head_counts", "top entries, kept exactly, per position", np.int32, "position"),
    TeacherColumn("tail_counts", "entries sampled from the tail, per position", np.int32, "position"),
    TeacherColumn("entry_gaps",
                  "2^23 + id less the one before (0): top entries by id, then the tail by id; see teacher_entries",
                  np.float32, "entry", byte_split=True),
    TeacherColumn("entry_logprobs",
                  "log-probabilities of all entries at teacher.temperature, rounded (teacher.logprob_bits), nats",
                  np.float32, "entry", byte_split=True),
)  # fmt: skip

TRAINED_ON: dict[str, TeacherColumn] = {c.name: c for c in TEACHER_COLUMNS if c.trained_on}
"""The columns that training reads, by name."""

BYTE_SPLIT: tuple[str, ...] = tuple(c.name for c in TEACHER_COLUMNS if c.byte_split)

_N_ENTRIES = "list_sum(head_counts) + list_sum(tail_counts)"
ROW_IS_WHOLE = " AND ".join(
    f"len({c.name}) = {'len(head_counts)' if c.per == 'position' else _N_ENTRIES}" for c in TEACHER_COLUMNS
)
"""SQL condition: all lists of a row of `teacher_logits` fit each other."""
