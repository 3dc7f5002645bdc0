"""Attention of queries that every rank has over keys and values that are spread over the ranks.

Each rank attends to its own keys; the partial results, small where the queries are few, are exchanged and merged. Two ranks
send each other all of theirs. More ranks trade them by heads, merge what they got, and hand the result round: one collective
more, and a fraction of the bytes. The same numbers are merged in the same order either way, so all ranks hold the same
result. LTX-2's video-to-audio attention is the case in point: a few hundred audio queries over all video tokens. Gathering
the keys instead would move the video's width for every token.

Letters in shapes: B batch, T queries, n keys of this rank, H heads, E head width, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.local_attention import AttendWithLse, attention_with_lse
from rayltx.sequence_parallel.partition import Partition
from rayltx.sequence_parallel.softmax_merge import SoftmaxAccumulator
from rayltx.sequence_parallel.ulysses import all_gather_tokens, start_scatter_heads

# torch 2.13 renamed it.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_BY_HEADS_FROM = 3  # ranks. For two, the bytes that it saves are not worth a collective more.


def attention_over_sharded_keys(
    query: Tensor,
    key_local: Tensor,
    value_local: Tensor,
    group: SequenceParallelGroup,
    attend_with_lse: AttendWithLse = attention_with_lse,
    mask_local: Tensor | None = None,
) -> Tensor:
    """query: (B, T, H, E), the same on every rank. key_local, value_local: (B, n, H, E).

    mask_local: additive or boolean, broadcastable to (B, H, T, n): the columns of this rank's keys.
    Returns (B, T, H, E), the same on every rank, of the query's dtype.
    Collective: one all-gather of float32, B T H (E + 1) values from each rank; or an all-to-all of the (W - 1) / W of them that
    are others' heads, and an all-gather of B T H E / W values of the query's dtype.
    """
    assert group.world is not None, "with one rank there is nothing to merge: use the host's own attention"
    B, T, H, E = query.shape
    out, lse = attend_with_lse(query, key_local, value_local, mask_local)
    # float32 also for half-precision models: the partial results are few, and rounding them would cost accuracy twice.
    sent = torch.cat([out.to(lse.dtype), lse.transpose(1, 2).unsqueeze(-1)], dim=-1).contiguous()
    if group.world_size >= _BY_HEADS_FROM:
        return _merged_by_heads(sent, group.world, query.dtype)
    received = sent.new_empty(group.world_size, *sent.shape)
    getattr(dist, ALL_GATHER)(received.view(-1), sent.view(-1), group=group.world)
    return _merged(list(received), query.dtype)


def _merged_by_heads(sent: Tensor, world: ProcessGroup, dtype: torch.dtype) -> Tensor:
    """sent: (B, T, H, E + 1), this rank's part of all heads. Returns (B, T, H, E)."""
    ranks, T = dist.get_world_size(world), sent.shape[1]
    heads = Partition.even(sent.shape[2], ranks)
    # As if each rank had the queries of a sequence that is as long as there are ranks.
    received = start_scatter_heads(sent, Partition((T,) * ranks), heads.slices, world).wait()
    mine = _merged(received.split(T, dim=1), dtype)
    return all_gather_tokens(mine.transpose(1, 2), heads, world).transpose(1, 2)


def _merged(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """parts: (B, T, h, E + 1), the log-sum-exp last. Returns (B, T, h, E)."""
    accumulator = SoftmaxAccumulator()
    for part in parts:
        accumulator.add(part[..., :-1], part[..., -1].transpose(1, 2))
    return accumulator.result(dtype)
