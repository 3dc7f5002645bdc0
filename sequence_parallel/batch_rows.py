"""The rows of a batch over groups of ranks: positive and negative conditioning, several clips.

Rows do not look at each other, so that groups exchange nothing before the answer. Where a batch cannot be cut evenly, fewer
groups of more ranks take it, and all ranks share a single row.

Letters in shapes: B rows of the batch, b of this rank's group.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import Partition, number_of_groups
from rayltx.sequence_parallel.ulysses import gather_tokens


@dataclass(frozen=True)
class RowShare:
    """A batch over the groups, as one rank sees it."""

    group: SequenceParallelGroup  # that shares the tokens of this rank's rows
    local: slice  # which rows these are
    batch: int
    of_all: SequenceParallelGroup

    @classmethod
    def of(cls, group: SequenceParallelGroup, batch: int, unit: int = 1) -> RowShare:
        """Over as many groups as there can be, each of which has as many rows.

        unit: see `number_of_groups`; it divides the batch.
        """
        groups = number_of_groups((1, *group.row_groups), batch, unit)
        if groups == 1:
            return cls.together(group, batch)
        within, rows = group.row_group(groups), batch // groups
        index = group.rank // within.world_size
        return cls(within, slice(index * rows, (index + 1) * rows), batch, group)

    @classmethod
    def together(cls, group: SequenceParallelGroup, batch: int) -> RowShare:
        """All rows to all ranks."""
        return cls(group, slice(0, batch), batch, group)

    @property
    def is_whole(self) -> bool:
        """Whether all ranks have all rows."""
        return self.group.world_size == self.of_all.world_size

    def cut(self, value: Tensor) -> Tensor:
        """The local rows, where the first dimension is the batch's; else the tensor itself."""
        return value[self.local] if value.ndim and value.shape[0] == self.batch > 1 else value

    def gather(self, answer: Tensor) -> Tensor | None:
        """(B, ...) on rank 0, of what the first rank of each group has; None elsewhere.

        answer: (b, ...) on the first rank of each group, and of that shape on the others, where it is not looked at.
        Collective: every rank of `of_all`.
        """
        if self.is_whole:
            return answer if self.of_all.rank == 0 else None
        self.of_all.at_end()
        rows = self.local.stop - self.local.start
        size = self.group.world_size
        sizes = Partition(tuple(0 if rank % size else rows for rank in range(self.of_all.world_size)))
        whole = gather_tokens(answer[: sizes.sizes[self.of_all.rank]][None], sizes, self.of_all.world)
        return None if whole is None else whole[0]
