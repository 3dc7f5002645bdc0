"""A rank among others that are not there, whose tensors have shapes and no numbers: for counting at real sizes.

Nothing is computed and nothing is sent, so that a layer of any width and any number of ranks takes seconds on any machine.
Source of the idea: torch's FakeTensorMode and its fake process group.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from rayltx.cli.bench.live_tensors import LiveTensors
from rayltx.cli.bench.traffic import counted_traffic
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig


@dataclass
class Counts:
    """Of a forward on one rank."""

    flops: int = 0
    received_bytes: int = 0  # from other ranks
    collectives: int = 0
    operations: int = 0
    peak_bytes: int = 0  # of what the forward has made, beside weights and inputs
    held_at_peak: dict[str, int] = field(default_factory=dict)  # bytes by the line that made them


@contextlib.contextmanager
def rank_zero_of(config: ParallelConfig) -> Iterator[SequenceParallelGroup]:
    """The group of rank 0, which is alone. Within the `with`, in a process without a group of its own."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if config.world_size == 1:
        yield SequenceParallelGroup.single()
        return
    dist.init_process_group("fake", rank=0, world_size=config.world_size, store=FakeStore())
    try:
        yield SequenceParallelGroup.create(config)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count what is computed, exchanged and held within the `with`, which has to be in a FakeTensorMode."""
    counts = Counts()
    live = LiveTensors()
    flops = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    )
    # One kernel on a GPU; the CPU's is many, which hold float32 copies.
    fused = mock.patch.object(torch.nn.functional, "rms_norm", lambda input, *args, **kwargs: torch.empty_like(input))
    with counted_traffic(is_carried=False) as traffic, fused, live, flops:
        yield counts
    counts.flops, counts.operations = flops.get_total_flops(), live.operations
    counts.received_bytes, counts.collectives = traffic.received_bytes, traffic.collectives
    counts.peak_bytes, counts.held_at_peak = live.peak_bytes, live.held_at_peak


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of shapes (B, H, T, E)."""
    return 4 * math.prod(query) * key[2]
