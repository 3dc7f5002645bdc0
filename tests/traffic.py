"""Count what torch.distributed moves, at the calls themselves."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from unittest import mock

import torch.distributed as dist


@dataclass
class Traffic:
    received_bytes: int = 0  # from other ranks
    collectives: int = 0


@contextlib.contextmanager
def counted():
    traffic = Traffic()
    rank = dist.get_rank()
    gather_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    all_to_all, all_gather = dist.all_to_all_single, getattr(dist, gather_name)

    def count_all_to_all(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        assert output_split_sizes is not None
        traffic.collectives += 1
        traffic.received_bytes += (sum(output_split_sizes) - output_split_sizes[rank]) * output.element_size()
        return all_to_all(output, input, output_split_sizes, input_split_sizes, **kwargs)

    def count_all_gather(output, input, **kwargs):
        traffic.collectives += 1
        traffic.received_bytes += (output.numel() - input.numel()) * output.element_size()
        return all_gather(output, input, **kwargs)

    def refuse(*args, **kwargs):
        raise AssertionError("a collective that is not counted")

    others = ["all_reduce", "broadcast", "all_gather", "gather", "scatter", "reduce_scatter_tensor", "isend", "irecv",
              "batch_isend_irecv", "all_to_all"]  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "all_to_all_single", count_all_to_all))
        stack.enter_context(mock.patch.object(dist, gather_name, count_all_gather))
        for name in others:
            stack.enter_context(mock.patch.object(dist, name, refuse))
        yield traffic
