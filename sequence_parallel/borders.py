"""Neighbouring ranks show each other the borders of what each holds of a dimension, as a convolution needs them.

Source: halo exchange of domain decomposition; the same for image models in Spatial Parallelism, arXiv 1810.10962.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rayltx.sequence_parallel.group import SequenceParallelGroup


def with_borders(local: Tensor, dim: int, width: int, group: SequenceParallelGroup) -> tuple[Tensor, int]:
    """What this rank holds along `dim`, with the nearest `width` of each neighbour.

    local: of any shape, in which each rank holds at least `width` of `dim`. The first rank has no neighbour before it, and the
    last none behind it.
    Returns the joined tensor, and how much of it comes before this rank's own. Collective: every rank in `group` must call it,
    with tensors that differ along `dim` alone.
    """
    rank, last, held = group.rank, group.world_size - 1, local.shape[dim]
    if group.world is None or width == 0:
        return local, 0
    assert held >= width, f"rank {rank} holds {held} of dimension {dim}, and its neighbours need {width}"
    if local.numel() == 0:
        width_before, width_behind = (width if rank else 0), (width if rank < last else 0)
        shape = list(local.shape)
        shape[dim] += width_before + width_behind
        return local.new_empty(shape), width_before
    operations, parts, before = [], [local], 0
    if rank > 0:
        peer = dist.get_global_rank(group.world, rank - 1)
        first = local.narrow(dim, 0, width).contiguous()
        operations.append(dist.P2POp(dist.isend, first, peer, group.world))
        arriving = torch.empty_like(first)
        operations.append(dist.P2POp(dist.irecv, arriving, peer, group.world))
        parts.insert(0, arriving)
        before = width
    if rank < last:
        peer = dist.get_global_rank(group.world, rank + 1)
        behind = local.narrow(dim, held - width, width).contiguous()
        operations.append(dist.P2POp(dist.isend, behind, peer, group.world))
        arriving = torch.empty_like(behind)
        operations.append(dist.P2POp(dist.irecv, arriving, peer, group.world))
        parts.append(arriving)
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return torch.cat(parts, dim), before
