"""Which rank makes no progress: told by the blocks that it enters, not by the time that a step takes."""

from __future__ import annotations

import time
from collections.abc import Collection

import numpy as np

from rayltx.distributed_worker.step_control import StepControl

_TIMES = 10.0  # a block's usual time
_KNOWN_FROM = 3  # of a rank's blocks


class Progress:
    """Of one step. What a block usually takes comes from the step's own blocks, and before there are some from the control."""

    def __init__(self, control: StepControl, at_least_s: float, unknown_s: float) -> None:
        """at_least_s: that a rank may stay in a block. unknown_s: the same where a block's usual time is not known yet, or a rank
        has not entered the first while others have: weights may be on their way to a device, kernels may be compiled.
        """
        self._control, self._expected_s = control, control.usual_s
        self._at_least_s, self._unknown_s = at_least_s, max(at_least_s, unknown_s)
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
        if self._times:
            self._control.usual_s = float(np.median(self._times))
        usual_s = self._control.usual_s
        if len(self._times) < _KNOWN_FROM * len(blocks):
            usual_s = max(usual_s, self._expected_s) if self._expected_s else 0.0
        limit_s = max(self._at_least_s, _TIMES * usual_s) if behind and usual_s else self._unknown_s
        if now - self.last < limit_s:
            return {}  # they meet in every block: where one goes on, all do; with rows apart, until it comes to the last
        return {rank: seconds for rank, seconds in waiting.items() if blocks[rank] == behind}

    def where(self, rank: int) -> int:
        """The block that a rank entered last, from 1; 0 before the first."""
        return self._seen[rank]
