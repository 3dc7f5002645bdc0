"""A link between two ranks by a model, next to clocks that no other process disturbs.

A collective begins when both ranks have asked for it and the link is free, and takes its bytes over the link's speed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from rayltx.sequence_parallel.sharded_keys import ALL_GATHER


class Link:
    """With the clock of one of the ranks: its thread's processor time, and what it waits for the link."""

    def __init__(self, rank: int, posted: Tensor) -> None:
        self._rank, self._posted = rank, posted  # (ranks, collectives): when each asked for it, on its clock
        self.restart(math.inf)

    def restart(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.bytes, self._number, self._free = bytes_per_s, 0, 0, 0.0
        self._added, self._began = 0.0, time.thread_time()

    def now(self) -> float:
        return time.thread_time() - self._began + self._added

    def post(self, received_bytes: int) -> Callable[[], None]:
        """Ask for a collective. What is returned is called when it is really over, and moves the clock."""
        number, self._number = self._number, self._number + 1
        self._posted[self._rank, number] = self.now()
        self.bytes += received_bytes

        def over() -> None:
            begins = max(float(self._posted[:, number].max()), self._free)
            self._free = begins + received_bytes / self.bytes_per_s
            self._added += max(0.0, self._free - self.now())

        return over


class _Work:
    def __init__(self, work: Any, over: Callable[[], None]) -> None:
        self._work, self._over = work, over

    def wait(self) -> None:
        self._work.wait()
        self._over()


@contextlib.contextmanager
def on(link: Link) -> Iterator[None]:
    """Let this process's exchanges go over a link. They are really made, too."""
    all_to_all, all_gather = dist.all_to_all_single, getattr(dist, ALL_GATHER)

    def timed_all_to_all(
        received: Tensor,
        sent: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        own = output_split_sizes[dist.get_rank()]
        over = link.post((received.numel() - own) * received.element_size())
        work = _Work(all_to_all(received, sent, output_split_sizes, input_split_sizes, group, async_op=True), over)
        return work if async_op else work.wait()

    def timed_all_gather(received: Tensor, sent: Tensor, group: Any = None) -> None:
        over = link.post((received.numel() - sent.numel()) * received.element_size())
        _Work(all_gather(received, sent, group=group, async_op=True), over).wait()

    with (
        mock.patch.object(dist, "all_to_all_single", timed_all_to_all),
        mock.patch.object(dist, ALL_GATHER, timed_all_gather),
    ):
        yield
