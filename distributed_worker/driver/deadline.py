"""What is done when a time is over, unless something was quicker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def called_after(limit_s: float, function: Callable[..., object], *arguments: object) -> Iterator[None]:
    """Call a function, in another thread, if what is done within the `with` takes longer."""
    timer = threading.Timer(limit_s, function, arguments)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
