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
from enum import Enum

import numpy as np

from rayltx.errors import ClusterError

_ALIGNMENT = 64


class Access(Enum):
    """What a mapping is for."""

    READ = "read"  # writing to it ends the process (SIGSEGV)
    WRITE = "write"  # what is written is there for all who map the file
    OWN = "own"  # what is written is there for this mapping alone, whose pages are copied then


class MemoryFile:
    """Of this process. It lives as long as this object here, and as any mapping elsewhere. Pickled, it is a `ForeignFile`."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(8)
        self.fd = os.memfd_create(f"rayltx-{self._token}", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd).atexit = False

    def __reduce__(self) -> tuple[object, ...]:
        return ForeignFile, (os.getpid(), self.fd, self._token)

    def map(self, access: Access = Access.READ) -> mmap.mmap:
        """Its bytes."""
        return _map(self.fd, access)


@dataclass(frozen=True)
class ForeignFile:
    """Another process's. pid, fd: that process's. token: in the file's name, which tells it from a later one of that number."""

    pid: int
    fd: int
    token: str

    def map(self, access: Access = Access.READ) -> mmap.mmap:
        """As `MemoryFile.map`. Raises ClusterError where the file is gone, or not for this process."""
        path = f"/proc/{self.pid}/fd/{self.fd}"
        try:
            own = os.open(path, os.O_RDWR if access is Access.WRITE else os.O_RDONLY)
            try:
                if self.token not in os.readlink(f"/proc/self/fd/{own}"):
                    raise FileNotFoundError(path)
                return _map(own, access)
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

    def array(self, mapped: dict[int, mmap.mmap] | None = None, access: Access = Access.READ) -> np.ndarray:
        """(bytes,) uint8 on the shared bytes. It keeps the mapping alive.

        mapped: the segments that have been mapped so, by id, for several parts of one.
        """
        mapped = {} if mapped is None else mapped
        whole = mapped.get(id(self.segment))
        if whole is None:
            whole = mapped[id(self.segment)] = self.segment.map(access)
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


def _map(fd: int, access: Access) -> mmap.mmap:
    if access is Access.OWN:  # not populated, which would copy every page
        return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    populate = getattr(mmap, "MAP_POPULATE", 0)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if access is Access.WRITE else 0)
    return mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | populate, prot=protection)
