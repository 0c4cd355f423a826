"""The stored teacher distribution as tensors.

Shapes: T response positions, K stored entries of the widest position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's distribution at T response positions: its top entries exactly, and samples of the tail.

    Rows are already shifted: row t is the teacher's prediction of response token t."""

    ids: Tensor
    """[T, K] int64: vocabulary ids. Top entries of a row are distinct. A tail id that was drawn twice appears twice,
    each time with its weight. Padding, which is neither top nor tail, may hold any valid id."""
    logprobs: Tensor
    """[T, K] float32: the teacher's log p at `ids`, in nats, at the temperature of the stored rows. -inf is a
    probability of 0; padding may hold anything."""
    is_top: Tensor
    """[T, K] bool: top entries."""
    is_tail: Tensor
    """[T, K] bool: entries that were sampled from outside the top entries."""
    tail_logmass: Tensor
    """[T] float32: exact log of the teacher's mass outside the top entries; -inf when there is none."""

    def weights(self) -> Tensor:
        """Weights [T, K] in the dtype of `logprobs`: the probability of a top entry, an equal share of the tail's mass
        for each tail sample, 0 for padding.

        A row sums to 1, or to the mass of its top entries when it has no tail samples."""
        n_tail = self.is_tail.sum(-1, keepdim=True).clamp(min=1)  # [T, 1]
        tail = (self.tail_logmass[:, None].exp() / n_tail).expand_as(self.logprobs)  # [T, K]
        top = self.logprobs.exp().where(self.is_top, 0.0)  # [T, K]
        return tail.where(self.is_tail, top)

    def take(self, rows: slice) -> TeacherTargets:
        """The targets of some rows, as views: nothing is copied."""
        return TeacherTargets(**{name: tensor[rows] for name, tensor in vars(self).items()})
