"""Ulysses: trade a slice of the tokens for a slice of the heads, and back.

Every rank of a Ulysses group holds some tokens of a chunk with all heads. After `scatter_heads` it holds all tokens of
the chunk with some heads, and can attend without its neighbours; `gather_heads` is the way back. Neither tokens nor
heads need divide: all sizes are known on every rank, so uneven parts travel as they are. Both also take some of each
rank's heads, so that these travel while others are attended to.

Letters in shapes: B batch, n tokens of this rank, N tokens of the chunk, H heads, h heads of this rank, E head width.
Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from rayltx.sequence_parallel.partition import Partition


@dataclass
class PendingExchange:
    """An exchange that is under way. `wait` may be called once."""

    work: dist.Work | None
    sent: Tensor | None
    received: Tensor

    def wait(self) -> Tensor:
        """(B, N, h, E), in the order of the tokens. A strided view of the received buffer."""
        assert self.work is not None, "waited for already"
        self.work.wait()
        self.work = self.sent = None  # which hold memory
        return self.received.transpose(0, 1)


def start_scatter_heads(
    x_local: Tensor, tokens: Partition, heads: Sequence[slice], group: ProcessGroup
) -> PendingExchange:
    """Start to trade this rank's tokens of some heads of every rank for all tokens of this rank's.

    x_local: (B, n, H, E), any dtype that the backend carries.
    tokens: the parts of the chunk's tokens. heads: which heads go to each rank of `group`.
    Collective: every rank in `group` must call it, in the same order among its other collectives.
    """
    B, n, H, E = x_local.shape
    rank, sizes = dist.get_rank(group), _sizes(heads)
    assert n == tokens.sizes[rank] and heads[-1].stop <= H, (x_local.shape, tokens, heads, rank)
    # Tokens come first in the messages, so that what arrives from several ranks is one tensor without another copy.
    rows = x_local.transpose(0, 1)
    parts = [n * B * size * E for size in sizes]
    sent = x_local.new_empty(sum(parts))
    for part, size, some in zip(sent.split(parts), sizes, heads):
        part.view(n, B, size, E).copy_(rows[:, :, some])
    h = sizes[rank]
    received = x_local.new_empty(tokens.total, B, h, E)
    work = dist.all_to_all_single(
        received.view(-1),
        sent,
        output_split_sizes=[size * B * h * E for size in tokens.sizes],
        input_split_sizes=parts,
        group=group,
        async_op=True,
    )
    return PendingExchange(work, sent, received)


@dataclass
class PendingGather:
    """The way back, under way. `put_into` may be called once."""

    work: dist.Work | None
    sent: Tensor | None
    received: Tensor
    heads: Sequence[slice]

    def put_into(self, out: Tensor) -> None:
        """Wait, and put the heads into their places. out: (n, B, H, E)."""
        assert self.work is not None, "waited for already"
        self.work.wait()
        self.work = self.sent = None  # which hold memory
        n, B, _, E = out.shape
        sizes = _sizes(self.heads)
        for part, size, some in zip(self.received.split([n * B * size * E for size in sizes]), sizes, self.heads):
            out[:, :, some] = part.view(n, B, size, E)


def start_gather_heads(x: Tensor, tokens: Partition, heads: Sequence[slice], group: ProcessGroup) -> PendingGather:
    """Start to trade all tokens of this rank's heads for this rank's tokens of every rank's.

    x: (B, N, h, E), of the heads that `heads` has for this rank. Otherwise as `start_scatter_heads`.
    """
    B, N, h, E = x.shape
    rank = dist.get_rank(group)
    sent = x.transpose(0, 1).contiguous().view(-1)
    parts = [tokens.sizes[rank] * B * size * E for size in _sizes(heads)]
    received = x.new_empty(sum(parts))
    work = dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=parts,
        input_split_sizes=[size * B * h * E for size in tokens.sizes],
        group=group,
        async_op=True,
    )
    return PendingGather(work, sent, received, heads)


def gathered_heads(pending: Sequence[PendingGather], like: Tensor, num_tokens: int, num_heads: int) -> Tensor:
    """(B, n, H, E) of all that is under way. like: a tensor of the batch, head width, dtype and device."""
    out = like.new_empty(num_tokens, like.shape[0], num_heads, like.shape[-1])
    for each in pending:
        each.put_into(out)
    return out.transpose(0, 1)


def gather_heads(x: Tensor, tokens: Partition, heads: Partition, group: ProcessGroup) -> Tensor:
    """Trade all tokens of this rank's heads for this rank's tokens of all heads.

    x: (B, N, h, E). Returns (B, n, H, E), same dtype and device.
    Collective, as `start_scatter_heads`.
    """
    pending = start_gather_heads(x, tokens, heads.slices, group)
    return gathered_heads([pending], x, tokens.sizes[dist.get_rank(group)], heads.total)


def _sizes(heads: Sequence[slice]) -> list[int]:
    return [some.stop - some.start for some in heads]


def gather_tokens(x_local: Tensor, tokens: Partition, group: ProcessGroup | None, to_rank: int = 0) -> Tensor | None:
    """Collect the tokens of all ranks on one.

    x_local: (B, n, ...). Returns (B, N, ...) on `to_rank`, None on the others.
    Collective, as `start_scatter_heads`. Sent as an all-to-all: gloo has no gather of uneven parts.
    """
    if group is None:
        return x_local
    rank = dist.get_rank(group)
    B, rest = x_local.shape[0], x_local.shape[2:]
    width = B * math.prod(rest)
    here = rank == to_rank
    received = x_local.new_empty(tokens.total if here else 0, B, *rest)
    dist.all_to_all_single(
        received.view(-1),
        x_local.transpose(0, 1).contiguous().view(-1),
        output_split_sizes=[size * width if here else 0 for size in tokens.sizes],
        input_split_sizes=[tokens.sizes[rank] * width if to == to_rank else 0 for to in range(len(tokens.sizes))],
        group=group,
    )
    return received.transpose(0, 1) if here else None


def all_gather_tokens(x_local: Tensor, tokens: Partition, group: ProcessGroup) -> Tensor:
    """Collect the tokens of all ranks on every one.

    x_local: (B, n, ...). Returns (B, N, ...). It moves the width of every token to every rank: for where nothing less
    will do. Collective, and an all-to-all for the same reason as `gather_tokens`.
    """
    degree = len(tokens.sizes)
    B, rest = x_local.shape[0], x_local.shape[2:]
    width = B * math.prod(rest)
    sent = x_local.transpose(0, 1).contiguous().view(-1)
    received = x_local.new_empty(tokens.total, B, *rest)
    dist.all_to_all_single(
        received.view(-1),
        sent.repeat(degree),
        output_split_sizes=[size * width for size in tokens.sizes],
        input_split_sizes=[sent.numel()] * degree,
        group=group,
    )
    return received.transpose(0, 1)
