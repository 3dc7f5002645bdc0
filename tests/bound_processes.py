"""Processes that end with the test run."""

from __future__ import annotations

import sys

# A test run that is ended by a signal runs no fixture's end. Linux then tells its child, PR_SET_PDEATHSIG being 1.
_BOUND = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a run in the background of a shell ignores it, and so would this
ctypes.CDLL(None).prctl(1, signal.SIGINT)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def bound_to_this_process(*arguments: str) -> list[str]:
    """A Python's command that is interrupted when the thread that started it ends, for whatever reason."""
    return [sys.executable, "-c", _BOUND, *arguments]
