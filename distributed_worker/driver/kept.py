"""What stays in Ray's store."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Protocol

import numpy as np


class _Run(Protocol):
    """Of Ray, from its start to its end."""

    released: deque[int]  # numbers that are to be let go of: finalizers may come at any moment
    ended: str | None


class Kept:
    """An object in Ray's store, for as long as this lives. Where it stands among a call's arguments, a worker finds the object
    itself.
    """

    def __init__(self, run: _Run, number: int, source: np.ndarray | None = None) -> None:
        """source: what was put there from here, and can be put again."""
        self.run, self.number, self.source = run, number, source
        self._release = self._released_with()

    def move(self, run: _Run, number: int) -> None:
        """It has been put into another Ray's store."""
        self._release.detach()
        self.run, self.number = run, number
        self._release = self._released_with()

    def _released_with(self) -> weakref.finalize:
        release = weakref.finalize(self, self.run.released.append, self.number)
        release.atexit = False
        return release

    @property
    def is_there(self) -> bool:
        """Whether the Ray that keeps it runs still."""
        return self.run.ended is None
