"""The first exchange of a group: with known numbers, so that what arrives can be checked, and timed.

Between some boards GPUs copy to each other's memory without an error, and other bytes arrive, or none. This finds it before
a picture is made of them. Every kind of message that a forward sends is tried, with uneven parts.

Letters in shapes: B batch, n tokens of this rank, H heads, E head width.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from rayltx.errors import ExchangeError
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import Partition
from rayltx.sequence_parallel.ring import pass_on
from rayltx.sequence_parallel.ulysses import all_gather_tokens, gather_heads, gather_tokens, start_scatter_heads

_WIDTH = 5  # of a head; odd, as is the number of heads
_SMALL_REPEATS, _LARGE_REPEATS = 20, 3


@dataclass(frozen=True)
class ExchangeReport:
    """What the first exchange took."""

    bytes_per_s: float  # that a rank received from all others, while it sent as many
    small_s: float  # of a collective that carries next to nothing, the median


def check_exchange(group: SequenceParallelGroup, device: torch.device, num_bytes: int) -> ExchangeReport:
    """Try every kind of message between the ranks, then time them.

    num_bytes: that each rank sends in the timed exchange.
    Raises ExchangeError, when all messages are through, on each rank to which other numbers came than were sent.
    Collective: all ranks of the group call it.
    """
    assert group.world is not None, "a group of one rank exchanges nothing"
    complaints = []
    for part in (group, *group.row_groups.values()):
        if part.ulysses is not None and not _trades_heads(part.ulysses, device):
            complaints.append("trading tokens for heads (all-to-all)")
        if part.ring is not None and not _passes_on(part.ring, device):
            complaints.append("passing on to the next rank (send and receive)")
        if part.world is not None and not _gathers(part.world, device):
            complaints.append("gathering (all-to-all)")
    if not _carries_bulk(group.world, device, num_bytes):
        complaints.append(f"messages of {num_bytes // group.world_size} bytes")
    report = _timed(group.world, device, num_bytes)
    if complaints:
        raise ExchangeError(
            f"rank {group.rank} received other numbers than were sent, in {' and in '.join(dict.fromkeys(complaints))}"
        )
    return report


def _numbers(tokens: Partition, rank: int, num_heads: int, device: torch.device) -> Tensor:
    """(1, n, H, E) int32: each element's position in the whole of all ranks' tokens."""
    whole = torch.arange(tokens.total * num_heads * _WIDTH, dtype=torch.int32).view(1, tokens.total, num_heads, _WIDTH)
    return whole[:, tokens.slice(rank)].to(device)


def _uneven(degree: int) -> Partition:
    return Partition(tuple(3 + rank for rank in range(degree)))


def _trades_heads(group: ProcessGroup, device: torch.device) -> bool:
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    tokens, heads = _uneven(degree), Partition.even(2 * degree + 1, degree)
    sent = _numbers(tokens, rank, heads.total, device)
    received = start_scatter_heads(sent, tokens, heads.slices, group).wait()
    expected = _numbers(Partition((tokens.total,)), 0, heads.total, device)[:, :, heads.slice(rank)]
    back = gather_heads(expected, tokens, heads, group)  # not what was received: the rank that it was wrong for says so
    return torch.equal(received, expected) and torch.equal(back, sent)


def _passes_on(group: ProcessGroup, device: torch.device) -> bool:
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    tokens = _uneven(degree)
    received = torch.empty_like(_numbers(tokens, (rank - 1) % degree, 1, device))
    for request in pass_on(_numbers(tokens, rank, 1, device), received, group):
        request.wait()
    return torch.equal(received, _numbers(tokens, (rank - 1) % degree, 1, device))


def _gathers(group: ProcessGroup, device: torch.device) -> bool:
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    tokens = _uneven(degree)
    sent, everything = _numbers(tokens, rank, 1, device), _numbers(Partition((tokens.total,)), 0, 1, device)
    on_one, on_all = gather_tokens(sent, tokens, group), all_gather_tokens(sent, tokens, group)
    return torch.equal(on_all, everything) and (on_one is None or torch.equal(on_one, everything))


def _carries_bulk(group: ProcessGroup, device: torch.device, num_bytes: int) -> bool:
    """Large messages go by another way than small ones."""
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    part = max(1, num_bytes // degree)
    pattern = torch.arange(part, dtype=torch.int32).remainder_(251).to(torch.uint8)

    def from_to(sender: int, receiver: int) -> Tensor:
        return pattern + (sender * degree + receiver)  # wraps around

    sent = torch.cat([from_to(rank, to) for to in range(degree)]).to(device)
    received = torch.full_like(sent, 255)
    parts = [part] * degree
    dist.all_to_all_single(received, sent, output_split_sizes=parts, input_split_sizes=parts, group=group)
    return torch.equal(received.cpu(), torch.cat([from_to(sender, rank) for sender in range(degree)]))


def _timed(group: ProcessGroup, device: torch.device, num_bytes: int) -> ExchangeReport:
    degree = dist.get_world_size(group)
    part = max(1, num_bytes // degree)
    sent = torch.zeros(part * degree, dtype=torch.uint8, device=device)
    small = torch.zeros(degree, dtype=torch.uint8, device=device)
    large_s = min(_exchange_s(sent, group) for _ in range(_LARGE_REPEATS))
    small_s = statistics.median(_exchange_s(small, group) for _ in range(_SMALL_REPEATS))
    return ExchangeReport(part * (degree - 1) / large_s, small_s)


def _exchange_s(sent: Tensor, group: ProcessGroup) -> float:
    """Seconds of an even all-to-all, until what it brought can be read."""
    received = torch.empty_like(sent)
    parts = [sent.numel() // dist.get_world_size(group)] * dist.get_world_size(group)
    started = time.perf_counter()
    dist.all_to_all_single(received, sent, output_split_sizes=parts, input_split_sizes=parts, group=group)
    received[-1:].cpu()  # waits for the device
    return time.perf_counter() - started
