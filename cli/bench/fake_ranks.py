"""A rank among others that are not there, whose tensors have shapes and no numbers: for counting at real sizes.

Nothing is computed and nothing is sent, so that a layer of any width and any number of ranks takes seconds on any machine.
Source of the idea: torch's FakeTensorMode and its fake process group.
"""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rayltx.about import ROOT
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
    live = _LiveTensors()
    flops = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    )
    # One kernel on a GPU; the CPU's is many, which hold float32 copies.
    fused = mock.patch.object(torch.nn.functional, "rms_norm", lambda input, *args, **kwargs: torch.empty_like(input))
    with _counted_exchange(counts), fused, live, flops:
        yield counts
    counts.flops, counts.operations = flops.get_total_flops(), live.operations
    counts.peak_bytes, counts.held_at_peak = live.peak, live.at_peak


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of shapes (B, H, T, E)."""
    return 4 * math.prod(query) * key[2]


class _Done:
    """A collective that is under way."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def _counted_exchange(counts: Counts) -> Iterator[None]:
    """Every collective that a forward calls, in place of torch's. Raises AttributeError by name for any other."""

    def all_to_all(
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> _Done | None:
        assert output_split_sizes is not None
        counts.collectives += 1
        here = output_split_sizes[dist.get_rank(group)]
        counts.received_bytes += (sum(output_split_sizes) - here) * output.element_size()
        return _Done() if async_op else None

    def all_gather(output: Tensor, input: Tensor, group: Any = None) -> None:
        counts.collectives += 1
        counts.received_bytes += (output.numel() - input.numel()) * output.element_size()

    def passed_on(operations: list[dist.P2POp]) -> list[_Done]:
        counts.collectives += 1
        counts.received_bytes += sum(each.tensor.nbytes for each in operations if each.op is dist.irecv)
        return [_Done() for _ in operations]

    named = {"all_to_all_single": all_to_all, "batch_isend_irecv": passed_on}
    # torch 2.13 renamed it.
    named["all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"] = all_gather
    with contextlib.ExitStack() as scope:
        for name, function in named.items():
            scope.enter_context(mock.patch.object(dist, name, function))
        yield


class _LiveTensors(TorchDispatchMode):
    """What has been made and is alive, by the line of source that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.peak = 0, 0
        self.at_peak: dict[str, int] = {}
        self._live: dict[int, tuple[int, str]] = {}  # by storage: its bytes, and the line
        self._bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.operations += 1
        given = {storage_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in given and storage_of(tensor) not in self._live:
                self._made(tensor)
        return out

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, num_bytes = storage_of(tensor), storage.nbytes()
        self._live[number] = num_bytes, _line()
        self._bytes += num_bytes
        weakref.finalize(storage, self._gone, number)
        if self._bytes > self.peak:
            self.peak, by_line = self._bytes, Counter[str]()
            for each, line in self._live.values():
                by_line[line] += each
            self.at_peak = dict(by_line.most_common())

    def _gone(self, number: int) -> None:
        self._bytes -= self._live.pop(number)[0]


def storage_of(tensor: Tensor) -> int:
    """What tensors on the same memory have in common."""
    return tensor.untyped_storage()._cdata  # noqa: SLF001 (storages are made anew at each look, and compare by address of the data)


def _line() -> str:
    """The innermost line that is not torch's."""
    frame = sys._getframe(2)  # noqa: SLF001 (the documented way, for speed)
    while frame.f_back is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(ROOT) if ROOT in path.parents and "site-packages" not in path.parts else path.name
    return f"{name}:{frame.f_lineno}"
