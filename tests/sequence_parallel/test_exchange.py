"""The exchange alone, against attention computed whole in float64."""

import dataclasses
import itertools
from unittest import mock

import pytest
import torch

from rayltx.cli.bench.live_tensors import LiveTensors
from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.sequence_parallel import sharded_keys
from rayltx.sequence_parallel.batch_rows import RowShare
from rayltx.sequence_parallel.exchange_memory import exchange_bytes
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.local_attention import torch_attention
from rayltx.sequence_parallel.masks import DenseMask, GroupedMask
from rayltx.sequence_parallel.partition import ParallelConfig, Partition, TokenPartition
from rayltx.sequence_parallel.self_attention import SelfAttentionExchange, head_groups
from rayltx.sequence_parallel.sharded_keys import attention_over_sharded_keys
from rayltx.sequence_parallel.ulysses import gather_heads, gather_tokens, start_scatter_heads

from rank_pool import RankPool

DEGREES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)]
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(batch, tokens, heads, width, dtype):
    return [random(batch, tokens, heads, width, seed=seed, dtype=dtype) for seed in range(3)]


def dense_mask(tokens, heads, dtype):
    """Hides some keys from some queries, weakens others, never a whole row."""
    mask = random(1, heads, tokens, tokens, seed=5)
    mask = mask.masked_fill(random(1, 1, tokens, tokens, seed=6) > 0.7, -torch.inf)
    mask[..., 0] = 0.0
    return mask.to(dtype)


def grouped_mask(tokens, dtype):
    """As ComfyUI's guides make it: noisy queries, tracked guide queries, the rest."""
    start, tracked = tokens // 2, tokens // 4
    weights = random(tracked, seed=7).abs()
    noisy = torch.zeros(1, 1, 1, tokens)
    noisy[..., start : start + tracked] = torch.log(weights)
    guide = torch.zeros(1, 1, tracked, tokens)
    guide[..., :start] = torch.log(weights)[:, None]
    groups = ((start, noisy.to(dtype)), (tracked, guide.to(dtype)), (tokens - start - tracked, None))
    dense = torch.zeros(1, 1, tokens, tokens)
    dense[:, :, :start] = noisy
    dense[:, :, start : start + tracked] = guide
    return GroupedMask(groups), dense.to(dtype)


def rows_of_a_batch(degrees, batch, unit):
    """(where this rank's rows are, the config of its group, what rank 0 has gathered of their numbers)"""
    share = RowShare.of(SequenceParallelGroup.create(ParallelConfig(*degrees)), batch, unit)
    rows = share.cut(torch.arange(batch, dtype=torch.float32)[:, None].expand(-1, 3))
    own = rows if share.group.rank == 0 else torch.full_like(rows, -1.0)
    whole = share.gather(own)
    return (share.local.start, share.local.stop), share.group.config, None if whole is None else whole.tolist()


@pytest.mark.parametrize(
    "batch, unit, rows, within",
    [
        (2, 1, (1, 1), (2, 1)), (4, 2, (2, 2), (2, 1)), (4, 4, (2, 2), (2, 1)), (1, 1, (1,), (4, 1)), (3, 1, (3,), (4, 1)),
        (6, 2, (6,), (4, 1)),  # a half of the rows is not a whole number of pairs
    ],
)  # fmt: skip
def test_rows_go_to_groups_that_have_as_many(ranks, batch, unit, rows, within):
    found = ranks.run(4, rows_of_a_batch, (2, 1, 2), batch, unit)
    starts = [sum(rows[:number]) for number in range(len(rows))]
    size = 4 // len(rows)
    for rank, (local, config, whole) in enumerate(found):
        assert local == (starts[rank // size], starts[rank // size] + rows[rank // size])
        assert config == ParallelConfig(*within)
        assert whole == ([[float(row)] * 3 for row in range(batch)] if rank == 0 else None)


def test_as_many_groups_as_the_rows_allow(ranks):
    sizes = [
        [config.world_size for _, config, _ in ranks.run(4, rows_of_a_batch, (1, 1, 2, 2), n, 1)] for n in (4, 2, 1)
    ]
    assert sizes == [[1] * 4, [2] * 4, [4] * 4]


def attention_of_first(degrees, order, heads):
    """By number of ranks, in an order: what so many of the first come to, without the others or each other; last, all of them."""
    of_all = SequenceParallelGroup.create(ParallelConfig(*degrees))
    found = {}
    for number in order:
        if of_all.rank < number:
            group = of_all.first[number]
            found[number] = attended(RowShare.of(group, 2).group, heads), attended(group, heads)
    found[of_all.world_size] = (attended(of_all, heads),)
    return found, tuple(of_all.first)


def attended(group, heads):
    """Of a group's tokens, gathered on its rank 0."""
    partition = TokenPartition.of(29, group.config)
    q, k, v = (x[:, partition.local(group.rank)] for x in qkv(1, 29, heads, 8, torch.float32))
    exchange = SelfAttentionExchange(group, partition, heads)
    value, query, key = exchange.send(v), exchange.send(q), exchange.send(k)
    whole = gather_tokens(exchange.attend(query, key, value, torch_attention), partition.tokens, group.world)
    return None if whole is None else whole.numpy()


@pytest.fixture(scope="module")
def six_ranks():
    """Of fewer, no two different numbers above one do without the others."""
    pool = RankPool(6)
    yield pool
    pool.close()


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
@pytest.mark.parametrize("degrees", [(5, 1), (6, 1), (3, 2), (3, 1, 2)])
def test_the_first_ranks_share_a_sequence_while_others_do_not(six_ranks, degrees, order):
    """Three and two of them in any order, though some have no part in the one or the other."""
    reference = whole_attention(*qkv(1, 29, 5, 8, torch.float32))
    world_size = ParallelConfig(*degrees).world_size
    for rank, (found, of_first) in enumerate(six_ranks.run(world_size, attention_of_first, degrees, order, 5)):
        parts = [number for number in (3, 2) if rank < number]
        assert sorted(of_first) == sorted(parts) and sorted(found) == sorted([*parts, world_size])
        for outs in found.values():
            assert all((out is None) == (rank > 0) for out in outs) or len(outs) > 1
            for out in outs:
                if out is not None:
                    assert relative_error(torch.from_numpy(out), reference) < 5e-7


def whole_attention(q, k, v, mask=None):
    """float64, by the formula."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask.double()
    return (scores.softmax(-1) @ v).transpose(1, 2)


def shard_and_attend(degrees, batch, tokens, heads, width, dtype, mask_kind):
    group = (
        SequenceParallelGroup.create(ParallelConfig(*degrees)) if degrees != (1, 1) else SequenceParallelGroup.single()
    )
    partition = TokenPartition.of(tokens, group.config)
    mine = partition.local(group.rank)
    q, k, v = (x[:, mine] for x in qkv(batch, tokens, heads, width, dtype))
    mask = None
    if mask_kind == "dense":
        mask = DenseMask(dense_mask(tokens, heads, dtype))
    elif mask_kind == "grouped":
        mask, _ = grouped_mask(tokens, dtype)
    exchange = SelfAttentionExchange(group, partition, heads)
    value, query, key = exchange.send(v), exchange.send(q), exchange.send(k)
    out = exchange.attend(query, key, value, torch_attention, mask=mask)
    assert out.shape == q.shape and out.dtype == dtype
    gathered = gather_tokens(out, partition.tokens, group.world)
    return gathered.float().numpy() if gathered is not None else None


@pytest.mark.parametrize("mask_kind", [None, "dense", "grouped"])
@pytest.mark.parametrize("degrees", DEGREES)
def test_self_attention_equals_the_whole_in_float32(ranks, degrees, mask_kind):
    # 29 tokens and 5 heads: neither divides by 2, 3 or 4.
    batch, tokens, heads, width = 2, 29, 5, 8
    world_size = degrees[0] * degrees[1]
    out = ranks.run(world_size, shard_and_attend, degrees, batch, tokens, heads, width, torch.float32, mask_kind)[0]
    mask = {
        None: None,
        "dense": dense_mask(tokens, heads, torch.float32),
        "grouped": grouped_mask(tokens, torch.float32)[1],
    }
    reference = whole_attention(*qkv(batch, tokens, heads, width, torch.float32), mask[mask_kind])
    assert relative_error(torch.from_numpy(out), reference) < 5e-7  # a few roundings of float32


@pytest.mark.parametrize("degrees", [(2, 1), (4, 1), (1, 3), (2, 2)])
def test_self_attention_in_bfloat16_is_as_close_as_one_rank(ranks, degrees):
    batch, tokens, heads, width = 1, 67, 6, 16
    inputs = qkv(batch, tokens, heads, width, torch.bfloat16)
    reference = whole_attention(*inputs)
    alone = relative_error(torch_attention(*inputs), reference)
    out = ranks.run(
        degrees[0] * degrees[1], shard_and_attend, degrees, batch, tokens, heads, width, torch.bfloat16, None
    )
    error = relative_error(torch.from_numpy(out[0]), reference)
    # Ulysses changes nothing but the batch of heads; the ring rounds each part once more before it is merged.
    assert error < alone * (1.02 if degrees[1] == 1 else 1.5), (error, alone)


@pytest.mark.parametrize("degrees", [(2, 1), (4, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("tokens, heads", [(3, 4), (1, 1), (7, 1), (2, 3)])
def test_ranks_without_tokens_or_heads_take_part(ranks, degrees, tokens, heads):
    out = ranks.run(degrees[0] * degrees[1], shard_and_attend, degrees, 1, tokens, heads, 8, torch.float32, None)[0]
    reference = whole_attention(*qkv(1, tokens, heads, 8, torch.float32))
    assert relative_error(torch.from_numpy(out), reference) < 5e-7


def shard_in_groups(degrees, tokens, heads, mask_kind):
    """The answer to attention by numbers of groups, by number."""
    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    partition = TokenPartition.of(tokens, group.config)
    q, k, v = (x[:, partition.local(group.rank)] for x in qkv(2, tokens, heads, 8, torch.float32))
    mask = {
        None: None,
        "dense": DenseMask(dense_mask(tokens, heads, torch.float32)),
        "grouped": grouped_mask(tokens, torch.float32)[0],
    }
    answers = {}
    for count in (1, 2, 3, 16):
        exchange = SelfAttentionExchange(dataclasses.replace(group, head_groups=count), partition, heads, 2)
        value, query, key = exchange.send(v), exchange.send(q), exchange.send(k)
        groups = len(value.groups)
        answers[count, groups] = exchange.attend(query, key, value, torch_attention, mask=mask[mask_kind])
    return {key: answer.numpy() for key, answer in answers.items()}


@pytest.mark.parametrize("mask_kind", [None, "dense", "grouped"])
@pytest.mark.parametrize("degrees, most", [((2, 1), 5), ((3, 1), 3), ((4, 1), 2), ((2, 2), 1)])
def test_heads_in_groups_give_the_same_bits(ranks, degrees, most, mask_kind):
    """11 heads: of three ranks one has one less than the others. With a ring there is one group."""
    for answers in ranks.run(degrees[0] * degrees[1], shard_in_groups, degrees, 29, 11, mask_kind):
        assert set(answers) == {(count, min(count, most)) for count in (1, 2, 3, 16)}
        whole = answers[1, 1]
        assert all((answer == whole).all() for answer in answers.values())


def test_groups_fill_a_device():
    """A hundred and twenty-eight blocks of 128 queries at least, and never more groups than heads, or four."""
    assert head_groups(14080, 1, 16) == 4  # LTX-2 at 121 frames, two ranks
    assert head_groups(14080, 1, 4) == 3
    assert head_groups(4992, 1, 4) == 1
    assert head_groups(230520, 1, 3) == 3
    assert head_groups(60, 1, 16) == head_groups(0, 1, 16) == head_groups(14080, 1, 0) == 1


def of_all_queries(query, key, value, mask=None):
    """A kernel whose answer to one query depends on the others."""
    return torch_attention(query - query.mean(1, keepdim=True), key, value, mask)


def shard_and_attend_together(degrees, tokens, heads, mask_kind):
    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    partition = TokenPartition.of(tokens, group.config)
    mine = partition.local(group.rank)
    q, k, v = (x[:, mine] for x in qkv(2, tokens, heads, 8, torch.float32))
    mask = DenseMask(dense_mask(tokens, heads, torch.float32)) if mask_kind else None
    exchange = SelfAttentionExchange(group, partition, heads)
    value, query, key = exchange.send(v), exchange.send(q), exchange.send(k)
    out = exchange.attend(query, key, value, of_all_queries, mask=mask, mergeable=False, queries_together=True)
    gathered = gather_tokens(out, partition.tokens, group.world)
    return gathered.float().numpy() if gathered is not None else None


@pytest.mark.parametrize("mask_kind", [None, "dense"])
@pytest.mark.parametrize("degrees", [(2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("tokens, heads", [(29, 5), (3, 2)])
def test_a_kernel_that_looks_at_all_queries_is_shown_them(ranks, degrees, tokens, heads, mask_kind):
    out = ranks.run(degrees[0] * degrees[1], shard_and_attend_together, degrees, tokens, heads, mask_kind)[0]
    mask = dense_mask(tokens, heads, torch.float32) if mask_kind else None
    query, key, value = qkv(2, tokens, heads, 8, torch.float32)
    reference = whole_attention(query - query.mean(1, keepdim=True), key, value, mask)
    assert relative_error(torch.from_numpy(out), reference) < 5e-7


def scatter_and_gather(tokens, heads):
    group = SequenceParallelGroup.create(ParallelConfig(3, 1))
    parts, by_head = Partition.even(tokens, 3), Partition.even(heads, 3)
    x = torch.arange(2 * tokens * heads * 2).view(2, tokens, heads, 2)
    mine = x[:, parts.slice(group.rank)]
    scattered = start_scatter_heads(mine, parts, by_head.slices, group.ulysses).wait()
    back = gather_heads(scattered, parts, by_head, group.ulysses)
    return bool((scattered == x[:, :, by_head.slice(group.rank)]).all()), bool((back == mine).all())


def test_heads_travel_to_their_rank_and_back(ranks):
    assert ranks.run(3, scatter_and_gather, 11, 7) == [(True, True)] * 3


def attend_sharded_keys(world_size, batch, queries, tokens, heads, width, dtype, masked):
    group = SequenceParallelGroup.create(ParallelConfig(world_size, 1))
    mine = TokenPartition.of(tokens, group.config).local(group.rank)
    q, k, v = sharded_keys_inputs(batch, queries, tokens, heads, width, dtype)
    mask = key_mask(tokens)[..., mine] if masked else None
    return attention_over_sharded_keys(q, k[:, mine], v[:, mine], group, mask_local=mask).float().numpy()


def attend_sharded_keys_both_ways(world_size, heads, dtype):
    group = SequenceParallelGroup.create(ParallelConfig(world_size, 1))
    mine = TokenPartition.of(31, group.config).local(group.rank)
    q, k, v = sharded_keys_inputs(2, 13, 31, heads, 8, dtype)
    outs = []
    for by_heads_from in (2, 100):
        with mock.patch.object(sharded_keys, "_BY_HEADS_FROM", by_heads_from):
            outs.append(attention_over_sharded_keys(q, k[:, mine], v[:, mine], group))
    return bool((outs[0] == outs[1]).all()), outs[0].shape == q.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size, heads", [(2, 3), (3, 7), (4, 3), (4, 1)])
def test_parts_traded_by_heads_have_the_same_bits(ranks, world_size, heads, dtype):
    """Also on ranks that get no head to merge."""
    assert ranks.run(world_size, attend_sharded_keys_both_ways, world_size, heads, dtype) == [(True, True)] * world_size


def sharded_keys_inputs(batch, queries, tokens, heads, width, dtype):
    _, k, v = qkv(batch, tokens, heads, width, dtype)
    return random(batch, queries, heads, width, seed=9, dtype=dtype), k, v


def key_mask(tokens):
    """Hides the first third of the keys: at 3 ranks and more, all that some rank holds."""
    mask = torch.zeros(1, 1, 1, tokens)
    mask[..., : tokens // 3] = -torch.inf
    return mask


@pytest.mark.parametrize("world_size, masked", list(itertools.product([2, 3, 4], [False, True])))
def test_sharded_keys_merge_to_the_whole_and_ranks_agree_bitwise(ranks, world_size, masked):
    arguments = (2, 13, 31, 3, 8, torch.float32)
    outs = ranks.run(world_size, attend_sharded_keys, world_size, *arguments, masked)
    reference = whole_attention(*sharded_keys_inputs(*arguments), key_mask(31) if masked else None)
    assert relative_error(torch.from_numpy(outs[0]), reference) < 5e-7
    assert all((out == outs[0]).all() for out in outs)


def test_more_ranks_than_keys(ranks):
    outs = ranks.run(4, attend_sharded_keys, 4, 1, 5, 2, 3, 8, torch.float32, False)
    reference = whole_attention(*sharded_keys_inputs(1, 5, 2, 3, 8, torch.float32))
    assert relative_error(torch.from_numpy(outs[0]), reference) < 5e-7


def peak_of_the_exchange(config, batch, tokens, heads, width, dtype):
    """The most bytes that this rank's exchange holds at once; the attention itself allocates nothing but its output."""
    group = SequenceParallelGroup.create(config)
    partition = TokenPartition.of(tokens, config)
    q, k, v = (x[:, partition.local(group.rank)].contiguous() for x in qkv(batch, tokens, heads, width, dtype))

    def attend(query, key, value, mask):
        return torch.zeros_like(query, memory_format=torch.contiguous_format)

    def attend_with_lse(query, key, value, mask):
        return attend(query, key, value, mask), query.new_zeros(batch, query.shape[2], query.shape[1]).float()

    exchange = SelfAttentionExchange(group, partition, heads)
    with LiveTensors() as memory:
        sent = [exchange.send(x) for x in (v, q, k)]
        exchange.attend(sent[1], sent[2], sent[0], attend, attend_with_lse)
    return memory.peak_bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("degrees", [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
def test_the_estimate_of_the_exchanges_memory_is_what_it_takes(ranks, degrees, dtype):
    batch, tokens, heads, width = 2, 1212, 12, 64
    config = ParallelConfig(*degrees)
    arguments = (config, batch, tokens, heads, width, dtype)
    peak = max(ranks.run(config.world_size, peak_of_the_exchange, *arguments))
    estimate = exchange_bytes(config, tokens, batch, heads, width, dtype.itemsize)
    # By itself the attention has its output, and once more as it is handed on.
    own = 2 * tokens // config.world_size * batch * heads * width * dtype.itemsize
    print(degrees, dtype, f"{peak / estimate:.2f}", f"{peak / (estimate + own):.2f}")
    assert 0.75 * estimate <= peak <= 1.05 * (estimate + own)
