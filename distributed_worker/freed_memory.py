"""Freed memory, given back to the system."""

from __future__ import annotations

import ctypes
import gc
import os


def give_back_freed_memory() -> None:
    """Collect what only circles of references hold, and return the C heap's freed pages to the system.

    Private copies of patched weights are a few MB each: glibc keeps such blocks in its heap, in pieces, and every change
    of a LoRA would leave some behind in every worker (seen: 3 MB a change).
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's own
    if trim is not None:
        trim(0)
