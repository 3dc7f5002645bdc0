"""Releases what the workers hold for MODELs and VAEs that are gone.

In a thread of its own: the finaliser of a MODEL may run inside of Ray's own locks.
"""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import queue
import threading
import weakref
from typing import Protocol

logger = logging.getLogger(__name__)


class Releasable(Protocol):
    """What the workers hold for an object of this process."""

    def release(self) -> None: ...


# What stood for objects that are gone; an Event asks to be set when all before it are done. A SimpleQueue can be put to in a
# finaliser, whatever is going on in the thread that it interrupts.
_orphans: queue.SimpleQueue[Releasable | threading.Event | None] = queue.SimpleQueue()
_RELEASE_TIMEOUT_S = 30.0


@functools.cache
def _janitor() -> threading.Thread:
    """The thread that releases what is queued, started at the first call."""

    def work() -> None:
        while True:
            orphan = _orphans.get()
            if orphan is None:
                return
            if isinstance(orphan, threading.Event):
                orphan.set()
                continue
            try:
                orphan.release()
            except Exception:  # the thread must go on
                logger.exception("a model could not be released")
            del orphan

    thread = threading.Thread(target=work, name="rayltx-janitor", daemon=True)
    thread.start()
    atexit.register(_end, thread)
    return thread


def _end(thread: threading.Thread) -> None:
    """Before the interpreter goes: a thread that frees tensors then is ended in the middle of torch's code, which aborts."""
    _orphans.put(None)
    thread.join(_RELEASE_TIMEOUT_S)


def wait_for_releases() -> None:
    """Return when the workers have been told to forget every model whose MODEL is gone."""
    gc.collect()
    done = threading.Event()
    _janitor()
    _orphans.put(done)
    if not done.wait(_RELEASE_TIMEOUT_S):
        logger.warning("models that are no longer used were not released within %.0f s", _RELEASE_TIMEOUT_S)


def release_with(owner: object, held: Releasable) -> None:
    """Let the workers forget what they hold when its owner here, such as ComfyUI's `base_model`, is collected."""
    _janitor()
    weakref.finalize(owner, _orphans.put, held).atexit = False
