"""Bytes that other processes of this machine map, without a copy and without a name.

They lie in memory files (memfd_create(2)): no path, no limit of /dev/shm, and nothing left when the last process that has one
is gone, however it ended. Another process of the same user opens one through /proc, by the owner's process id and descriptor.
"""

from __future__ import annotations

import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayltx.errors import ClusterError

_ALIGNMENT = 64


class MemoryFile:
    """Of this process. It lives as long as this object here, and as any mapping elsewhere. Pickled, it is a `ForeignFile`."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(8)
        self.fd = os.memfd_create(f"rayltx-{self._token}", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd).atexit = False

    def __reduce__(self) -> tuple[object, ...]:
        return ForeignFile, (os.getpid(), self.fd, self._token)

    def map(self, writable: bool = False) -> mmap.mmap:
        """Its bytes. writable: what is written to them is there for all who map it."""
        return _map(self.fd, writable)


@dataclass(frozen=True)
class ForeignFile:
    """Another process's. pid, fd: that process's. token: in the file's name, which tells it from a later one of that number."""

    pid: int
    fd: int
    token: str

    def map(self, writable: bool = False) -> mmap.mmap:
        """As `MemoryFile.map`. Raises ClusterError where the file is gone, or not for this process."""
        path = f"/proc/{self.pid}/fd/{self.fd}"
        try:
            own = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
            try:
                if self.token not in os.readlink(f"/proc/self/fd/{own}"):
                    raise FileNotFoundError(path)
                return _map(own, writable)
            finally:
                os.close(own)
        except OSError as error:
            raise ClusterError(
                f"what process {self.pid} has shared is gone, or is not for this process ({error}); workers need to be of the "
                "user and in the container of the process that started them"
            ) from error


class Segment(MemoryFile):
    """Some arrays' bytes, one after another."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """parts: (bytes,) uint8 each; copied."""
        super().__init__()
        self.offsets: list[int] = []
        end = 0
        for part in parts:
            self.offsets.append(end)
            _write(self.fd, part, end)
            end += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
        os.ftruncate(self.fd, max(end, 1))

    def parts(self, sizes: Sequence[int]) -> list[SharedBytes]:
        return [SharedBytes(self, offset, size) for offset, size in zip(self.offsets, sizes)]


@dataclass(frozen=True)
class SharedBytes:
    """Some of a segment's bytes. Crosses to other processes of this machine by pickling."""

    segment: Segment | ForeignFile
    offset: int
    nbytes: int

    def array(self, mapped: dict[int, mmap.mmap] | None = None) -> np.ndarray:
        """(bytes,) uint8 on the shared bytes: writing to it ends the process (SIGSEGV). It keeps the mapping alive.

        mapped: the segments that have been mapped, by id, for several parts of one.
        """
        mapped = {} if mapped is None else mapped
        whole = mapped.get(id(self.segment))
        if whole is None:
            whole = mapped[id(self.segment)] = self.segment.map()
        return np.frombuffer(whole, np.uint8, self.nbytes, self.offset)


def shared(data: np.ndarray) -> SharedBytes:
    """A copy of some bytes, in a segment of their own."""
    return Segment([data]).parts([data.nbytes])[0]


def _write(fd: int, data: np.ndarray, offset: int) -> None:
    # Writing spares the faults of a mapping whose every page is new.
    view = np.ascontiguousarray(data).data.cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _map(fd: int, writable: bool) -> mmap.mmap:
    populate = getattr(mmap, "MAP_POPULATE", 0)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | populate, prot=protection)
