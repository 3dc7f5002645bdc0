"""Who holds which part of a dimension. Nothing is padded: the parts may differ in size, and may be empty."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from rayltx.errors import ParallelConfigError


@dataclass(frozen=True)
class Partition:
    """A dimension cut into consecutive parts, one for each rank of a group."""

    sizes: tuple[int, ...]

    @classmethod
    def even(cls, total: int, parts: int) -> Partition:
        """As even as possible; the first parts are one longer where `parts` does not divide `total`."""
        short, longer = divmod(total, parts)
        return cls(tuple(short + 1 if part < longer else short for part in range(parts)))

    @cached_property
    def total(self) -> int:
        return sum(self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        return (0, *accumulate(self.sizes))[:-1]

    def slice(self, part: int) -> slice:
        return slice(self.starts[part], self.starts[part] + self.sizes[part])

    @cached_property
    def slices(self) -> tuple[builtins.slice, ...]:
        return tuple(map(self.slice, range(len(self.sizes))))

    def subdivided(self, count: int) -> list[tuple[builtins.slice, ...]]:
        """Each part cut into `count`, as evenly as possible: by number of the cut, what it has of each part."""
        cuts = [Partition.even(size, count) for size in self.sizes]
        return [
            tuple(
                slice(start + cut.slice(number).start, start + cut.slice(number).stop)
                for start, cut in zip(self.starts, cuts)
            )
            for number in range(count)
        ]


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks share the tokens, and how they exchange.

    ulysses_degree ranks trade tokens for heads, ring_degree such groups pass keys and values around; the product is
    the number of ranks. Ranks of one Ulysses group are neighbours (the exchange with the larger messages stays on the
    shorter links).
    Source: USP, arXiv 2405.07719.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1

    def __post_init__(self) -> None:
        for name in ("ulysses_degree", "ring_degree"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ParallelConfigError(f"{name}={value!r} must be a whole number of at least 1")

    @property
    def world_size(self) -> int:
        return self.ulysses_degree * self.ring_degree

    def check_workers(self, num_workers: int) -> None:
        """Raises ParallelConfigError if there are fewer workers than ranks. More are no harm: some then have no part."""
        if self.world_size > num_workers:
            raise ParallelConfigError(
                f"ulysses_degree={self.ulysses_degree} x ring_degree={self.ring_degree} = {self.world_size}, but there "
                f"are {num_workers} workers; start more, or lower a degree"
            )

    @classmethod
    def for_workers(cls, workers: int, ulysses_degree: int = 0, ring_degree: int = 0) -> ParallelConfig:
        """Fill in what is left open (0), and check the product.

        With both open, all workers form one Ulysses group: it moves the fewest bytes.
        Raises ParallelConfigError if the degrees do not multiply to `workers`.
        """
        if workers < 1:
            raise ParallelConfigError(f"workers={workers} must be at least 1")
        for name, degree in (("ulysses_degree", ulysses_degree), ("ring_degree", ring_degree)):
            if degree < 0 or (degree and workers % degree):
                fitting = [d for d in range(1, workers + 1) if workers % d == 0]
                raise ParallelConfigError(
                    f"{name}={degree} must divide workers={workers}; try one of {', '.join(map(str, fitting))}"
                )
        ulysses = ulysses_degree or workers // (ring_degree or 1)
        ring = ring_degree or workers // ulysses
        if ulysses * ring != workers:
            raise ParallelConfigError(
                f"ulysses_degree={ulysses} x ring_degree={ring} = {ulysses * ring}, but workers={workers}: the product "
                f"of the degrees must be the number of workers; try ulysses_degree={workers}, ring_degree=1"
            )
        return cls(ulysses, ring)


@dataclass(frozen=True)
class TokenPartition:
    """The tokens of one sequence over the ranks of a group.

    Rank r holds tokens `local(r)`; the ranks of one Ulysses group hold one consecutive chunk, `chunks.slice(ring_rank)`.
    """

    tokens: Partition
    config: ParallelConfig

    @classmethod
    def even(cls, num_tokens: int, config: ParallelConfig) -> TokenPartition:
        return cls(Partition.even(num_tokens, config.world_size), config)

    @property
    def num_tokens(self) -> int:
        return self.tokens.total

    def local(self, rank: int) -> slice:
        return self.tokens.slice(rank)

    @cached_property
    def chunks(self) -> Partition:
        degree = self.config.ulysses_degree
        return Partition(
            tuple(sum(self.chunk_sizes(ring_rank)) for ring_rank in range(len(self.tokens.sizes) // degree))
        )

    def chunk_sizes(self, ring_rank: int) -> tuple[int, ...]:
        """How many tokens of a chunk each rank of its Ulysses group holds."""
        degree = self.config.ulysses_degree
        return self.tokens.sizes[ring_rank * degree : (ring_rank + 1) * degree]
