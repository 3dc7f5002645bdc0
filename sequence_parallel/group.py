"""The process groups in which ranks share a batch, and a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

from rayltx.errors import ParallelConfigError
from rayltx.sequence_parallel.partition import ParallelConfig


def _go_on() -> None:
    pass


@dataclass(frozen=True)
class SequenceParallelGroup:
    """One rank's view of the ranks that share a sequence.

    The process groups are None where they would have one member: no collective is called then.
    row_groups: this rank's part of these ranks, where so many groups of them share the rows of a batch (see `batch_rows`).
    first: by how many, the group of the first of these ranks, where this is one of them (see `ParallelConfig.halves`).
    at_block: what a host calls before each transformer block, on every rank alike. It may raise, on every rank alike.
    at_end: what is called behind the blocks where ranks had other rows, and may have had other numbers of blocks.
    """

    config: ParallelConfig
    rank: int
    world: ProcessGroup | None = None
    ulysses: ProcessGroup | None = None
    ring: ProcessGroup | None = None
    head_groups: int = 0  # in how many groups a rank's heads travel; 0: by the shape
    row_groups: Mapping[int, SequenceParallelGroup] = field(default_factory=dict)
    first: Mapping[int, SequenceParallelGroup] = field(default_factory=dict)
    at_block: Callable[[], None] = field(default=_go_on, compare=False)
    at_end: Callable[[], None] = field(default=_go_on, compare=False)

    @property
    def world_size(self) -> int:
        return self.config.world_size

    @property
    def ulysses_rank(self) -> int:
        return self.rank % self.config.ulysses_degree

    @property
    def ring_rank(self) -> int:
        return self.rank // self.config.ulysses_degree

    @classmethod
    def single(cls) -> SequenceParallelGroup:
        """The group of one rank. Needs no initialised torch.distributed."""
        return cls(ParallelConfig(), rank=0)

    def row_group(self, groups: int) -> SequenceParallelGroup:
        """The ranks with which this one shares tokens, where so many groups share a batch's rows."""
        return dataclasses.replace(self.row_groups[groups], head_groups=self.head_groups, at_block=self.at_block)

    @classmethod
    def create(cls, config: ParallelConfig) -> SequenceParallelGroup:
        """Build the groups of the default process group.

        Returns that in which all ranks share a sequence, with those for the rows of a batch, and those of the first ranks.
        Collective: every rank must call it with the same config.
        Raises ParallelConfigError if the degrees do not multiply to the number of ranks.
        """
        world_size = dist.get_world_size()
        if config.world_size != world_size:
            raise ParallelConfigError(
                f"{config} = {config.world_size}, but there are {world_size} ranks: the product of the degrees must be the "
                "number of ranks"
            )
        # All of them now, by all ranks: torch names a group by how many a rank has, and ranks that had others would not meet.
        first = {ranks: cls._of_first(config.of_first(ranks)) for ranks in config.halves if ranks > 1}
        mine = {ranks: group for ranks, group in first.items() if group is not None}
        of_all = cls._of_first(config)
        assert of_all is not None
        return dataclasses.replace(of_all, first=mine)

    @classmethod
    def _of_first(cls, config: ParallelConfig) -> SequenceParallelGroup | None:
        """Of the first ranks, as many as the config has; None for others. Collective, of all ranks."""
        rank, world_size = dist.get_rank(), config.world_size
        row_groups = {}
        for groups in config.row_divisions[1:]:
            size = world_size // groups
            for index, within in enumerate(config.divided(groups)):
                ranks = list(range(index * size, (index + 1) * size))
                meshes = _Meshes.create(within, ranks)
                if rank in ranks:
                    row_groups[groups] = cls(within, rank - ranks[0], *meshes)
        together = config.of_group(1)
        meshes = _Meshes.create(together, list(range(world_size)))
        return cls(together, rank, *meshes, row_groups=row_groups) if rank < world_size else None


class _Meshes(NamedTuple):
    """Of one rank, in the order of `SequenceParallelGroup`."""

    world: ProcessGroup | None
    ulysses: ProcessGroup | None
    ring: ProcessGroup | None

    @classmethod
    def create(cls, config: ParallelConfig, ranks: Sequence[int]) -> _Meshes:
        """Of neighbouring ranks. Every rank creates every group, also those that it has no part in, in the same order."""
        world = _new_group(ranks)
        degree = config.ulysses_degree
        if config.ring_degree == 1:
            return cls(world, world, None)
        if degree == 1:
            return cls(world, None, world)
        parts = [_new_group(ranks[start : start + degree]) for start in range(0, len(ranks), degree)]
        across = [_new_group(ranks[start::degree]) for start in range(degree)]
        return cls(world, _one_of(parts), _one_of(across))


def _new_group(ranks: Sequence[int]) -> ProcessGroup | None:
    """None where this rank has no part in it, or is alone."""
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    created = dist.new_group(list(ranks))
    return created if dist.get_rank() in ranks else None


def _one_of(groups: Sequence[ProcessGroup | None]) -> ProcessGroup | None:
    return next((group for group in groups if group is not None), None)
