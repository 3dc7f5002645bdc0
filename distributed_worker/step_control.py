"""A few numbers that the ranks of a step and ComfyUI's process share while it runs: how far each rank is, and when to stop.

All ranks have to stop at the same block, or some would wait in an exchange for others that have left. So rank 0 decides: it
says at each block whether it goes on, and the others look there before they enter theirs. Ranks that share tokens meet in every
block anyway, so that it costs a look at memory; those that have other rows can be some blocks behind. The numbers lie in a
memory file (see `shared_bytes`); where ranks are on several machines they ask ComfyUI's process for each look (see
`meeting_server`).
"""

from __future__ import annotations

import os
import time

import numpy as np

from rayltx.distributed_worker.shared_bytes import Access, ForeignFile, MemoryFile
from rayltx.errors import RanksDisagree, StepCancelled

# Where each number is. Blocks count from 1 within a step. What rank 0 says is one number, which no other rank sees by halves: up
# to which block all go on, or below zero, before which they stop.
_WANTED, _SAID, _FIRST_RANK = 0, 1, 2
_CANCEL, _ABORT = 1, 2
_ALL = 2**62  # blocks, that a step never has
_SPINS = 200  # looks before the processor is left to others
_SLEEP_S = 0.0002


class StepControl:
    """Of one call. Crosses to the workers of this machine by pickling."""

    def __init__(self, num_ranks: int) -> None:
        file = MemoryFile()
        os.ftruncate(file.fd, 8 * (_FIRST_RANK + num_ranks))
        self._attach(file)

    def _attach(self, file: MemoryFile | ForeignFile) -> None:
        self._file = file
        self._numbers = np.frombuffer(file.map(Access.WRITE), np.int64)
        self.usual_s = 0.0  # that a block takes, as far as is known; for who watches the step

    def __getstate__(self) -> MemoryFile | ForeignFile:
        return self._file

    def __setstate__(self, file: MemoryFile | ForeignFile) -> None:
        self._attach(file)

    # ---- in ComfyUI's process

    def cancel(self) -> None:
        """Let all ranks stop at the next block, with StepCancelled. Their group stays whole."""
        if not self._numbers[_WANTED]:
            self._numbers[_WANTED] = _CANCEL

    def abort(self) -> None:
        """A rank has failed or is gone: let none wait for rank 0's word any more. Also for a worker."""
        self._numbers[_WANTED] = _ABORT

    def blocks(self) -> list[int]:
        """How many blocks each rank has entered."""
        return [int(number) for number in self._numbers[_FIRST_RANK:]]

    # ---- in a worker

    def at_block(self, rank: int) -> None:
        """This rank is about to enter a block. Raises StepCancelled, on every rank at the same block."""
        numbers = self._numbers
        block = int(numbers[_FIRST_RANK + rank]) + 1
        numbers[_FIRST_RANK + rank] = block
        if rank == 0 and self._numbers[_SAID] >= 0:
            numbers[_SAID] = -block if numbers[_WANTED] == _CANCEL else block
        said = self._said_of(block)
        # Ranks that are behind rank 0 go on to the block that it named: others of theirs may be in this one already.
        if said < 0 and block >= -said:
            raise StepCancelled(f"cancelled before block {-said}")

    def at_end(self, rank: int) -> None:
        """This rank has entered its last block. Others, that have other rows, may have more, and wait for no word any more."""
        if rank == 0 and self._numbers[_SAID] >= 0:
            self._numbers[_SAID] = _ALL

    def _said_of(self, block: int) -> int:
        looks = 0
        while abs(said := int(self._numbers[_SAID])) < block and said >= 0:
            if self._numbers[_WANTED] == _ABORT:
                raise RanksDisagree(f"another rank failed before block {block}")
            looks += 1
            if looks > _SPINS:
                time.sleep(_SLEEP_S)
        return said
