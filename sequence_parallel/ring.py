"""Ring attention: each rank keeps its queries while the keys and values of all chunks pass by.

Letters in shapes: B batch, N tokens of this rank's chunk, S tokens of a passing chunk, H heads, E head width.
Source: Ring Attention, arXiv 2310.01889.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from rayltx.sequence_parallel.local_attention import AttendWithLse
from rayltx.sequence_parallel.masks import SelfAttentionMask, attend_masked_with_lse
from rayltx.sequence_parallel.partition import Partition
from rayltx.sequence_parallel.softmax_merge import SoftmaxAccumulator


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunks: Partition,
    group: ProcessGroup,
    attend: AttendWithLse,
    mask: SelfAttentionMask | None = None,
    heads: slice = slice(None),
) -> Tensor:
    """Attention of this rank's chunk of queries over the keys and values of all chunks.

    query, key, value: (B, N, H, E), the rank's own chunk; `chunks` gives every rank's N.
    heads: which of the mask's heads these are.
    Returns (B, N, H, E), same dtype. Sums are kept in float32 at least.
    Collective: every rank in `group` must call it.
    """
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    queries = chunks.slice(rank)
    accumulator = SoftmaxAccumulator()
    passing = torch.stack([key, value])
    for step in range(degree):
        source = (rank - step) % degree  # whose keys are here now
        requests, arriving = [], None
        if step < degree - 1:
            arriving = passing.new_empty(2, key.shape[0], chunks.sizes[(source - 1) % degree], *key.shape[2:])
            requests = pass_on(passing, arriving, group)
        out, lse = attend_masked_with_lse(
            attend, query, passing[0], passing[1], mask, queries, chunks.slice(source), heads
        )
        accumulator.add(out, lse)
        for request in requests:
            request.wait()
        if arriving is not None:
            passing = arriving
    return accumulator.result(query.dtype)


def pass_on(sent: Tensor, received: Tensor, group: ProcessGroup) -> list[dist.Work]:
    """Start to send to the next rank of the ring and to receive from the previous one. Nothing travels for no elements.

    Collective: every rank in `group` must call it. The tensors live until each request has been waited for.
    """
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    operations = []
    if sent.numel():
        peer = dist.get_global_rank(group, (rank + 1) % degree)
        operations.append(dist.P2POp(dist.isend, sent, peer, group))
    if received.numel():
        peer = dist.get_global_rank(group, (rank - 1) % degree)
        operations.append(dist.P2POp(dist.irecv, received, peer, group))
    return dist.batch_isend_irecv(operations) if operations else []
