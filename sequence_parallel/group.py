"""The process groups of sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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
    at_block: what a host calls before each transformer block, on every rank alike. It may raise, on every rank alike.
    """

    config: ParallelConfig
    rank: int
    world: ProcessGroup | None = None
    ulysses: ProcessGroup | None = None
    ring: ProcessGroup | None = None
    head_groups: int = 0  # in how many groups a rank's heads travel; 0: by the shape
    at_block: Callable[[], None] = field(default=_go_on, compare=False)

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

    @classmethod
    def create(cls, config: ParallelConfig) -> SequenceParallelGroup:
        """Build the groups of the default process group.

        Collective: every rank must call it with the same config.
        Raises ParallelConfigError if the degrees do not multiply to the number of ranks.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if config.world_size != world_size:
            raise ParallelConfigError(
                f"ulysses_degree={config.ulysses_degree} x ring_degree={config.ring_degree} = {config.world_size}, "
                f"but there are {world_size} ranks: the product of the degrees must be the number of ranks"
            )
        world = dist.group.WORLD if world_size > 1 else None
        if config.ring_degree == 1:
            return cls(config, rank, world, ulysses=world)
        if config.ulysses_degree == 1:
            return cls(config, rank, world, ring=world)
        ulysses = ring = None
        degree = config.ulysses_degree
        for ring_rank in range(config.ring_degree):  # every rank creates every group, in the same order
            ranks = list(range(ring_rank * degree, (ring_rank + 1) * degree))
            created = dist.new_group(ranks)
            ulysses = created if rank in ranks else ulysses
        for ulysses_rank in range(degree):
            ranks = list(range(ulysses_rank, world_size, degree))
            created = dist.new_group(ranks)
            ring = created if rank in ranks else ring
        return cls(config, rank, world, ulysses, ring)
