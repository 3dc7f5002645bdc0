"""What tells the other ranks that one has failed.

A rank that fails in the middle of a forward leaves its group. On a GPU the others do not notice: their kernels wait for it,
and whatever asks the device for a number waits for the kernels. So it says so on the host, in the store that the group has
met in, and each of the others takes its own part of the group apart, which ends the kernels.
"""

from __future__ import annotations

import logging
import threading
import time

import torch.distributed as dist

from rayltx.distributed_worker.meeting import MeetingPoint

logger = logging.getLogger(__name__)

_KEY = "rayltx failed"
_POLL_S = 0.2
# How long a rank has to notice by itself: its own error says more than that it was told.
_GRACE_S = 1.0
_aborting = threading.Lock()


class FailureWatch:
    """Watches over one group, from one rank, until it is closed."""

    def __init__(self, meeting_point: MeetingPoint) -> None:
        """meeting_point: of the group's store. Raises what torch raises if it cannot be reached."""
        # Two connections: each is one thread's.
        self._store, self._watched = meeting_point.join(), meeting_point.join()
        self._working = threading.Event()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="rayltx-failure-watch", daemon=True).start()

    def tell(self) -> None:
        """This rank has failed."""
        try:
            self._store.set(_KEY, "1")
        except RuntimeError as error:  # the others notice it, if only when they are stuck
            logger.info("the group's store is gone: %s", error)

    def begin(self) -> None:
        """This rank begins with what the group does together."""
        self._working.set()

    def end(self) -> None:
        """It is through."""
        self._working.clear()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        try:
            while not self._watched.check([_KEY]):
                if self._closed.wait(_POLL_S):
                    return
        except RuntimeError as error:
            if not self._closed.is_set():
                logger.info("another rank's failure would not be told any more: %s", error)
            return
        until = time.monotonic() + _GRACE_S
        while self._working.is_set() and not self._closed.is_set():
            if time.monotonic() > until:
                logger.warning("another rank has failed: taking the group apart")
                abort_group()
                return
            time.sleep(_POLL_S / 4)


def abort_group() -> None:
    """Take this process's part of the group apart, whatever is under way in it."""
    with _aborting:  # the watch and the rank itself may come to it at once
        if dist.is_initialized():
            dist.distributed_c10d._abort_process_group()
