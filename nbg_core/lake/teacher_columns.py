"""The list columns of `teacher_logits`, which hold the teacher's distribution: one row of TEACHER_COLUMNS each.

From a row follow the column and its description, its encoding in Parquet, the condition on its lengths, and whether
training reads it. `teacher.store` computes the values and reads them back (`frame`, `decode`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

GAP_ZERO = 1 << 23
"""Added to every gap in `entry_gaps`. A float32 from 2^23 up to 2^24 is a whole number, and its low 23 bits are that
number minus 2^23. So the bytes of a stored gap are those of a small integer, which compress well when split."""


@dataclass(frozen=True)
class TeacherColumn:
    name: str
    meaning: str
    dtype: type[np.int32] | type[np.float32]
    per: Literal["position", "entry"]
    """Whether the list has an item per response position, or per stored entry of all positions, concatenated."""
    byte_split: bool = False
    """Whether Parquet files store it byte by byte (`base.files.write_parquet`), which is small where some bytes are
    mostly equal."""
    may_be_inf: bool = False
    trained_on: bool = True
    """Whether training reads it."""


TEACHER_COLUMNS: tuple[TeacherColumn, ...] = (
    TeacherColumn("token_logprobs",
                  "teacher log-probability of the response token itself, at teacher.temperature, nats",
                  np.float32, "position", byte_split=True, may_be_inf=True, trained_on=False),
    TeacherColumn("tail_logmass",
                  "log of the mass outside the top entries, computed exactly, stored to 1e-4 of it; -inf if none",
                  np.float32, "position", byte_split=True, may_be_inf=True),
    TeacherColumn("head_counts", "number of top entries (most probable tokens) per position", np.int32, "position"),
    TeacherColumn("tail_counts", "number of entries sampled from the tail, per position", np.int32, "position"),
    TeacherColumn("entry_gaps",
                  "2^23 + id - previous id (0 for the first), among top entries, then in the tail; see teacher_entries",
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
"""SQL condition on a row of `teacher_logits`: the lengths of its lists fit each other."""
