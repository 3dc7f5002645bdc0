"""Who holds which part of a dimension. Nothing is padded: the parts may differ in size, and may be empty."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from rayltx.errors import ParallelConfigError

_ROUNDING = 1e-9  # of a size that is whole on paper
DEGREES = ("ulysses_degree", "ring_degree", "cfg_degree", "dp_degree")


@dataclass(frozen=True)
class Partition:
    """A dimension cut into consecutive parts, one for each rank of a group."""

    sizes: tuple[int, ...]

    @classmethod
    def even(cls, total: int, parts: int) -> Partition:
        """As even as possible; the first parts are one longer where `parts` does not divide `total`."""
        short, longer = divmod(total, parts)
        return cls(tuple(short + 1 if part < longer else short for part in range(parts)))

    @classmethod
    def proportional(cls, total: int, shares: Sequence[float]) -> Partition:
        """By each part's share, which are positive and of any unit, rounded so that no part is off by a whole one.

        As `even` where the shares are equal.
        """
        exact = [total * share / sum(shares) for share in shares]
        sizes = [math.floor(size + _ROUNDING) for size in exact]
        most_lacking = sorted(range(len(sizes)), key=lambda part: (round(sizes[part] - exact[part], 9), part))
        for part in most_lacking[: total - sum(sizes)]:
            sizes[part] += 1
        return cls(tuple(sizes))

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
    """How many ranks share the work of a step, and how.

    The rows of a batch go to cfg_degree x dp_degree groups of neighbouring ranks: positive and negative conditioning, and
    several clips. Within a group the tokens are shared: ulysses_degree ranks trade tokens for heads, ring_degree such groups
    pass keys and values around. The product of all is the number of ranks. Ranks of one Ulysses group are neighbours (the
    exchange with the larger messages stays on the shorter links).
    shares: how much of a group's tokens and heads each rank gets, by the speed of its device, of any unit; (): all alike.
    Source: USP, arXiv 2405.07719.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1
    cfg_degree: int = 1
    dp_degree: int = 1
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in DEGREES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ParallelConfigError(f"{name}={value!r} must be a whole number of at least 1")
        if self.shares and len(self.shares) != self.world_size:
            raise ParallelConfigError(
                f"there are {len(self.shares)} shares for {self.world_size} ranks: give one for each, or none"
            )
        if not all(0 < share < math.inf for share in self.shares):
            raise ParallelConfigError(f"the shares {self.shares} must be numbers above 0")

    @property
    def row_groups(self) -> int:
        """The most groups of ranks that a batch's rows go to."""
        return self.cfg_degree * self.dp_degree

    @property
    def world_size(self) -> int:
        return self.ulysses_degree * self.ring_degree * self.row_groups

    def __str__(self) -> str:
        """Such as "ulysses 2 x ring 1"."""
        rows = {"cfg": self.cfg_degree, "dp": self.dp_degree}
        named = {"ulysses": self.ulysses_degree, "ring": self.ring_degree, **{k: v for k, v in rows.items() if v > 1}}
        return " x ".join(f"{name} {degree}" for name, degree in named.items())

    @property
    def row_divisions(self) -> tuple[int, ...]:
        """In how many groups a batch can be divided: `row_groups`, and what divides it."""
        return tuple(groups for groups in range(1, self.row_groups + 1) if self.row_groups % groups == 0)

    @property
    def largest_share(self) -> float:
        """The most of a batch's tokens that a rank can get, however the batch is divided."""
        if not self.shares:
            return 1 / self.world_size
        groups = [group.shares for number in self.row_divisions for group in self.divided(number)]
        return max(max(shares) / sum(shares) * len(shares) for shares in groups) / self.world_size

    def for_rows(self, rows: int) -> list[ParallelConfig]:
        """The groups to which a batch of so many rows goes."""
        return self.divided(number_of_groups(self.row_divisions, rows))

    def divided(self, groups: int) -> list[ParallelConfig]:
        """Each of `groups` groups. See `of_group`."""
        return [self.of_group(groups, index) for index in range(groups)]

    def of_group(self, groups: int, index: int = 0) -> ParallelConfig:
        """How the ranks of one of `groups` groups share the tokens of its rows.

        groups: one of `row_divisions`. With fewer, a group's ranks join by Ulysses, which moves the fewest bytes.
        """
        size = self.world_size // groups
        shares = self.shares[index * size : (index + 1) * size]
        return ParallelConfig(self.ulysses_degree * self.row_groups // groups, self.ring_degree, shares=shares)

    @property
    def halves(self) -> tuple[int, ...]:
        """Half of the ranks, half of these, and so on to 1: those of the first that can do without the others."""
        found, ranks = [], self.world_size
        while ranks > 1:
            ranks = (ranks + 1) // 2
            found.append(ranks)
        return tuple(found)

    def of_first(self, ranks: int) -> ParallelConfig:
        """How so many of the first ranks share a step without the others: rows go to as many groups as divide them."""
        left, degrees = ranks, {}
        for name in ("cfg_degree", "dp_degree", "ring_degree"):
            degrees[name] = math.gcd(getattr(self, name), left)
            left //= degrees[name]
        return ParallelConfig(left, **degrees, shares=self.shares[:ranks] if ranks > 1 else ())

    def token_sizes(self, num_tokens: int) -> Partition:
        """What each rank holds of a sequence. Of a config without row groups."""
        if not self.shares:
            return Partition.even(num_tokens, self.world_size)
        return Partition.proportional(num_tokens, self.shares)

    def head_sizes(self, num_heads: int) -> Partition:
        """What each rank of a Ulysses group attends to: the same in all of them, since keys go around between them."""
        degree = self.ulysses_degree
        if not self.shares:
            return Partition.even(num_heads, degree)
        return Partition.proportional(num_heads, [sum(self.shares[rank::degree]) for rank in range(degree)])

    def check_workers(self, num_workers: int) -> None:
        """Raises ParallelConfigError if there are fewer workers than ranks. More are no harm: some then have no part."""
        if self.world_size > num_workers:
            raise ParallelConfigError(
                f"{_as_product(vars(self))} = {self.world_size}, but there are {num_workers} workers; start more, or lower a "
                "degree"
            )

    @classmethod
    def for_workers(
        cls, workers: int, ulysses_degree: int = 0, ring_degree: int = 0, cfg_degree: int = 1, dp_degree: int = 1
    ) -> ParallelConfig:
        """Fill in what is left open (0), and check the product.

        With all open, the two rows of guidance go to different groups where the workers are even, and each group is one Ulysses
        group: that moves the fewest bytes. A batch that has not so many rows is shared by all ranks either way.
        Raises ParallelConfigError if the degrees do not multiply to `workers`.
        """
        if workers < 1:
            raise ParallelConfigError(f"workers={workers} must be at least 1")
        given = dict(zip(DEGREES, (ulysses_degree, ring_degree, cfg_degree, dp_degree)))
        for name, degree in given.items():
            if degree < 0 or (degree and workers % degree):
                fitting = [d for d in range(1, workers + 1) if workers % d == 0]
                raise ParallelConfigError(
                    f"{name}={degree} must divide workers={workers}; try one of {', '.join(map(str, fitting))}"
                )
        left = workers // math.prod(degree or 1 for degree in given.values())
        if not given["cfg_degree"]:
            given["cfg_degree"] = 2 if left % 2 == 0 and left else 1
            left //= given["cfg_degree"]
        given["dp_degree"] = given["dp_degree"] or 1  # what else would make clips of the GPUs' number?
        for name in ("ulysses_degree", "ring_degree"):
            if not given[name]:
                given[name], left = max(1, left), 1
        product = math.prod(given.values())
        if product != workers:
            raise ParallelConfigError(
                f"{_as_product(given)} = {product}, but workers={workers}: the product of the degrees must be the number of "
                f"workers; try ulysses_degree={workers} and 1 for the others"
            )
        return cls(given["ulysses_degree"], given["ring_degree"], given["cfg_degree"], given["dp_degree"])


def number_of_groups(divisions: Iterable[int], rows: int, unit: int = 1) -> int:
    """The most of `divisions`, 1 among them, that gives each group of ranks as many rows of a batch.

    unit: rows that follow each other and have to be known for one another's: a group has some of one unit, or whole ones.
    """
    fitting = [groups for groups in divisions if rows % groups == 0]
    return max(groups for groups in fitting if (rows // groups) % unit == 0 or unit % (rows // groups) == 0)


def _as_product(degrees: Mapping[str, int]) -> str:
    """Such as "ulysses_degree=2 x ring_degree=1"."""
    return " x ".join(f"{name}={degrees[name]}" for name in DEGREES if name in DEGREES[:2] or degrees[name] > 1)


@dataclass(frozen=True)
class TokenPartition:
    """The tokens of one sequence over the ranks of a group.

    Rank r holds tokens `local(r)`; the ranks of one Ulysses group hold one consecutive chunk, `chunks.slice(ring_rank)`.
    """

    tokens: Partition
    config: ParallelConfig

    @classmethod
    def of(cls, num_tokens: int, config: ParallelConfig) -> TokenPartition:
        """By the ranks' shares."""
        return cls(config.token_sizes(num_tokens), config)

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
