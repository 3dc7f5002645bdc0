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
    if group.world is None or width == 0:
        return local, 0
    rank, held = group.rank, local.shape[dim]
    assert held >= width, f"rank {rank} holds {held} of dimension {dim}, and its neighbours need {width}"
    shown = {rank - 1: local.narrow(dim, 0, width), rank + 1: local.narrow(dim, held - width, width)}  # by neighbour
    sent = {peer: part.contiguous() for peer, part in shown.items() if 0 <= peer < group.world_size}
    arriving = {peer: torch.empty_like(part) for peer, part in sent.items()}
    operations = []
    for peer in sent if local.numel() else ():
        global_rank = dist.get_global_rank(group.world, peer)
        operations.append(dist.P2POp(dist.isend, sent[peer], global_rank, group.world))
        operations.append(dist.P2POp(dist.irecv, arriving[peer], global_rank, group.world))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    parts = {**arriving, rank: local}
    return torch.cat([parts[peer] for peer in sorted(parts)], dim), width if rank > 0 else 0
