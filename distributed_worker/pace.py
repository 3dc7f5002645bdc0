"""Keeps the host from running far ahead of its device.

Work is asked of a GPU long before it is done. What a host says of its progress, and a cancel, would then be about the queue.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from rayltx.devices import DeviceKind

_BLOCKS_AHEAD = 2  # enough for the device never to wait


class Pace:
    """Of one step."""

    def __init__(self, device: DeviceKind) -> None:
        self._device = device
        self._events: deque[Any] = deque()

    def keep(self) -> None:
        """A block is about to be asked for: wait for the device to have come to the one that is two before. Nothing on a CPU."""
        if not self._device.copies_by_itself():
            return
        event = self._device.new_event()
        event.record()
        self._events.append(event)
        if len(self._events) > _BLOCKS_AHEAD:
            self._events.popleft().synchronize()
