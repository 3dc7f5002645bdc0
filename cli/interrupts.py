"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever the main thread happens to be, and some places swallow it: a callback from
compiled code, a finaliser. A command that a script starts in the background inherits it ignored. So it is always taken,
remembered, and looked at between steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


def _on_interrupt(signum: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt


@contextmanager
def remembered_interrupts() -> Iterator[None]:
    """Within the `with`, in the main thread."""
    before = signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_interrupted() -> None:
    """Raises KeyboardInterrupt if one was asked for, wherever it went."""
    if _asked.is_set():
        raise KeyboardInterrupt
