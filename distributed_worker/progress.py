"""Which rank makes no progress: told by the blocks that it enters, not by the time that a step takes."""

from __future__ import annotations

import time
from collections.abc import Collection

import numpy as np

from rayltx.distributed_worker.step_control import StepControl

_TIMES = 10.0  # a block's usual time
_AT_LEAST_S = 20.0
_BEFORE_THE_FIRST_S = 120.0  # where others have begun: weights may be on their way to a device, and come slower to one


class Progress:
    """Of one step."""

    def __init__(self, control: StepControl) -> None:
        self._control = control
        self._seen = control.blocks()
        self._since = [time.monotonic()] * len(self._seen)
        self._times: list[float] = []  # between a rank's blocks

    @property
    def last(self) -> float:
        """When a rank last entered a block, on the monotonic clock."""
        return max(self._since)

    def stuck(self, answered: Collection[int]) -> dict[int, float]:
        """The ranks that have entered no block for much longer than a block takes, and for how many seconds.

        None while no rank has entered the first, in front of which all weights may move.
        """
        now, blocks = time.monotonic(), self._control.blocks()
        for rank, (before, after) in enumerate(zip(self._seen, blocks)):
            if after > before:
                if before > 0:
                    self._times.append((now - self._since[rank]) / (after - before))
                self._since[rank] = now
        self._seen = blocks
        waiting = {rank: now - self._since[rank] for rank in range(len(blocks)) if rank not in answered}
        if not waiting or not any(blocks):
            return {}
        # The others wait for those that are behind.
        behind = min(blocks[rank] for rank in waiting)
        usual = float(np.median(self._times)) if self._times else 0.0
        limit_s = max(_AT_LEAST_S if behind else _BEFORE_THE_FIRST_S, _TIMES * usual)
        if now - self.last < limit_s:
            return {}  # they meet in every block: where one goes on, all do
        return {rank: seconds for rank, seconds in waiting.items() if blocks[rank] == behind}

    def where(self, rank: int) -> int:
        """The block that a rank entered last, from 1; 0 before the first."""
        return self._seen[rank]
