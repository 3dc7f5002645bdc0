"""Attention of queries that every rank has over keys and values that are spread over the ranks.

Each rank attends to its own keys; the partial results, small where the queries are few, are exchanged and merged.
Every rank merges the same numbers in the same order, so all hold the same result. LTX-2's video-to-audio attention is
the case in point: a few hundred audio queries over all video tokens. Gathering the keys instead would move the
video's width for every token.

Letters in shapes: B batch, T queries, n keys of this rank, H heads, E head width, W ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.local_attention import AttendWithLse, attention_with_lse
from rayltx.sequence_parallel.softmax_merge import SoftmaxAccumulator


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
    Collective: one all-gather of float32, B T H (E + 1) values from each rank.
    """
    assert group.world is not None, "with one rank there is nothing to merge: use the host's own attention"
    B, T, H, E = query.shape
    out, lse = attend_with_lse(query, key_local, value_local, mask_local)
    # float32 also for half-precision models: the partial results are few, and rounding them would cost accuracy twice.
    sent = torch.cat([out.to(lse.dtype), lse.transpose(1, 2).unsqueeze(-1)], dim=-1).contiguous()
    received = sent.new_empty(group.world_size, *sent.shape)
    # torch 2.13 renamed it.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(received.view(-1), sent.view(-1), group=group.world)
    accumulator = SoftmaxAccumulator()
    for part in received:
        accumulator.add(part[..., :E], part[..., E].transpose(1, 2))
    return accumulator.result(query.dtype)
