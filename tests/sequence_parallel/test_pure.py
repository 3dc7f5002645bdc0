"""Parts of the parallel layer that need no second process."""

import pytest
import torch

from rayltx.errors import ParallelConfigError
from rayltx.sequence_parallel.local_attention import attention_with_lse, plain_attention
from rayltx.sequence_parallel.partition import ParallelConfig, Partition, TokenPartition
from rayltx.sequence_parallel.softmax_merge import SoftmaxAccumulator


def test_even_partition_covers_everything_once():
    assert Partition.even(10, 4).sizes == (3, 3, 2, 2)
    assert Partition.even(2, 4).sizes == (1, 1, 0, 0)
    assert [Partition.even(10, 4).slice(part) for part in range(4)] == [
        slice(0, 3),
        slice(3, 6),
        slice(6, 8),
        slice(8, 10),
    ]


@pytest.mark.parametrize(
    "degrees, ranks, expected",
    [
        ((8,), 4, (4,)), ((5,), 3, (3,)), ((2, 2), 2, (1, 2)), ((2, 1, 2), 2, (1, 1, 2)), ((2, 1, 2), 3, (3,)), ((4,), 1, (1,)),
        ((1, 1, 2, 4), 4, (1, 1, 2, 2)), ((1, 1, 2, 2), 2, (1, 1, 2)), ((2, 2), 1, (1,)),
    ],
)  # fmt: skip
def test_the_first_ranks_share_as_all_do_where_that_divides(degrees, ranks, expected):
    assert ParallelConfig(*degrees).of_first(ranks) == ParallelConfig(*expected)


def test_half_of_the_ranks_and_half_of_these():
    halves = [ParallelConfig(number).halves for number in (1, 2, 3, 4, 5, 6, 8)]
    assert halves == [(), (1,), (2, 1), (2, 1), (3, 2, 1), (3, 2, 1), (4, 2, 1)]


def test_the_first_ranks_keep_their_shares():
    config = ParallelConfig(4, shares=(1.0, 2.0, 3.0, 4.0))
    assert config.of_first(2).shares == (1.0, 2.0) and config.of_first(1) == ParallelConfig()


@pytest.mark.parametrize("total", [0, 1, 7, 100, 14080])
@pytest.mark.parametrize("shares", [(1.0,), (1.0, 1.0, 1.0), (3.0, 2.0), (0.35, 1.0, 0.6, 1.0), (1e6, 1.0)])
def test_shares_are_kept_to_within_a_token(total, shares):
    sizes = Partition.proportional(total, shares).sizes
    assert sum(sizes) == total
    assert all(abs(size - total * share / sum(shares)) < 1 for size, share in zip(sizes, shares))
    if len(set(shares)) == 1:
        assert sizes == Partition.even(total, len(shares)).sizes


def test_ranks_of_a_ring_hold_the_same_heads_whatever_their_shares():
    config = ParallelConfig(2, 2, shares=(1.0, 2.0, 3.0, 1.0))
    assert config.token_sizes(70).sizes == (10, 20, 30, 10)
    assert config.head_sizes(7).sizes == (4, 3), "by the sums over the ring: 4 to 3"


def test_groups_of_rows_join_by_ulysses_where_there_are_fewer():
    config = ParallelConfig(2, 1, 2, 2, shares=tuple(range(1, 9)))
    assert (config.world_size, config.row_groups, config.row_divisions) == (8, 4, (1, 2, 4))
    assert config.of_group(1) == ParallelConfig(8, shares=config.shares)
    assert config.of_group(2, 1) == ParallelConfig(4, shares=(5, 6, 7, 8))
    assert config.of_group(4, 3) == ParallelConfig(2, shares=(7, 8))
    assert config.largest_share == max(8 / 36, 4 / 10 / 2, 2 / 3 / 4)
    assert ParallelConfig(2, 1, 2).largest_share == 1 / 4


@pytest.mark.parametrize(
    "shares, message", [((1.0,), "1 shares for 2 ranks"), ((1.0, 0.0), "above 0"), ((1.0, float("nan")), "above 0")]
)
def test_shares_that_cannot_be(shares, message):
    with pytest.raises(ParallelConfigError, match=message):
        ParallelConfig(2, shares=shares)


def test_ranks_of_a_ulysses_group_hold_one_consecutive_chunk():
    partition = TokenPartition.of(11, ParallelConfig(ulysses_degree=2, ring_degree=2))
    assert partition.tokens.sizes == (3, 3, 3, 2)
    assert partition.chunks.sizes == (6, 5)
    assert partition.chunk_sizes(1) == (3, 2)


@pytest.mark.parametrize(
    "workers, ulysses, ring, expected",
    [(4, 0, 0, (4, 1)), (4, 2, 0, (2, 2)), (4, 0, 4, (1, 4)), (6, 2, 3, (2, 3)), (1, 0, 0, (1, 1))],
)
def test_open_degrees_are_filled_in(workers, ulysses, ring, expected):
    config = ParallelConfig.for_workers(workers, ulysses, ring)
    assert (config.ulysses_degree, config.ring_degree) == expected


@pytest.mark.parametrize(
    "workers, degrees, expected",
    [
        (4, (0, 0, 0, 0), (2, 1, 2, 1)), (3, (0, 0, 0, 1), (3, 1, 1, 1)), (1, (0, 0, 0, 0), (1, 1, 1, 1)),
        (8, (2, 0, 2, 1), (2, 2, 2, 1)), (8, (2, 0, 1, 0), (2, 4, 1, 1)), (2, (2, 1, 0, 1), (2, 1, 1, 1)),
        (2, (0, 0, 0, 0), (1, 1, 2, 1)),
    ],
)  # fmt: skip
def test_rows_go_to_two_groups_where_that_is_left_open(workers, degrees, expected):
    config = ParallelConfig.for_workers(workers, *degrees)
    assert (config.ulysses_degree, config.ring_degree, config.cfg_degree, config.dp_degree) == expected


def test_ranks_need_as_many_workers():
    config = ParallelConfig(ulysses_degree=2, ring_degree=2)
    config.check_workers(4)
    config.check_workers(5)
    with pytest.raises(
        ParallelConfigError, match=r"2 x ring_degree=2 = 4, but there are 3 workers; start more, or lower"
    ):
        config.check_workers(3)


@pytest.mark.parametrize("workers, ulysses, ring", [(4, 3, 0), (4, 2, 1), (0, 0, 0), (2, 0, -1)])
def test_degrees_that_do_not_fit_are_refused_with_the_numbers(workers, ulysses, ring):
    with pytest.raises(ParallelConfigError) as error:
        ParallelConfig.for_workers(workers, ulysses, ring)
    assert (
        f"workers={workers}" in str(error.value)
        or "at least 1" in str(error.value)
        or "ring_degree=-1" in str(error.value)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, "additive", "boolean", "one row"])
def test_attention_with_lse_equals_the_formula(dtype, masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, size, 3, 16, generator=generator).to(dtype) for size in (7, 9, 9))
    mask = None
    if masked == "additive":
        mask = torch.randn(2, 1, 7, 9, generator=generator)
    elif masked == "boolean":
        mask = torch.rand(2, 3, 7, 9, generator=generator) > 0.3
    elif masked == "one row":
        mask = torch.randn(1, 1, 1, 9, generator=generator)
    out, lse = attention_with_lse(q, k, v, mask)
    wide = (
        None
        if mask is None
        else (
            torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)
            if mask.dtype == torch.bool
            else mask.to(dtype).double()
        )
    )
    reference, reference_lse = plain_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), wide)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert (out.double() - reference.transpose(1, 2)).norm() <= tolerance * reference.norm()
    assert (lse.double() - reference_lse).abs().max() <= max(tolerance, 1e-6)


@pytest.mark.parametrize("shape", [(1, 0, 2, 4, 8), (1, 3, 0, 2, 8), (1, 3, 2, 0, 8), (0, 3, 2, 2, 8)])
def test_empty_attention_gives_no_weight_and_does_not_crash(shape):
    batch, queries, keys, heads, width = shape
    q, k = torch.randn(batch, queries, heads, width), torch.randn(batch, keys, heads, width)
    out, lse = attention_with_lse(q, k, k)
    assert out.shape == q.shape and not out.any()
    assert lse.shape == (batch, heads, queries) and (lse == -torch.inf).all()


def test_a_row_without_visible_keys_has_no_weight():
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2, :] = -torch.inf
    out, lse = attention_with_lse(q, k, v, mask)
    assert (lse[:, :, 2] == -torch.inf).all() and not out[:, 2].any()
    assert torch.isfinite(lse[:, :, [0, 1, 3]]).all()


def test_merging_parts_in_any_order_gives_the_whole():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, size, 2, 8, generator=generator) * 3 for size in (5, 12, 12))
    whole, _ = attention_with_lse(q, k, v)
    for parts in [(slice(0, 4), slice(4, 12)), (slice(4, 12), slice(0, 4)), (slice(0, 0), slice(0, 12), slice(0, 0))]:
        accumulator = SoftmaxAccumulator()
        for part in parts:
            accumulator.add(*attention_with_lse(q, k[:, part], v[:, part]))
        torch.testing.assert_close(accumulator.result(torch.float32), whole, rtol=1e-5, atol=1e-6)


def test_merging_nothing_but_hidden_keys_gives_zeros_and_no_nan():
    accumulator = SoftmaxAccumulator()
    for _ in range(3):
        accumulator.add(torch.zeros(1, 2, 1, 4), torch.full((1, 1, 2), -torch.inf))
    assert (accumulator.result(torch.float32) == 0).all()
