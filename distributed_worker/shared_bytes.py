"""Bytes that other processes of this machine map, without a copy and without a name.

They lie in memory files (memfd_create(2)): no path, no limit of /dev/shm, and nothing left when the last process that has one
is gone, however it ended. Another process of the same user opens one through /proc, by the owner's process id and descriptor.

New pages cost more than the copy into them. So the owner of a segment may write other bytes into it when nobody looks at it any
more, and only then (`Segment.rewrite`).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from rayltx.errors import ClusterError

_ALIGNMENT = 64
_HEADER = struct.Struct("<q")


class Access(Enum):
    """What a mapping is for."""

    READ = "read"  # writing to it ends the process (SIGSEGV)
    WRITE = "write"  # what is written is there for all who map the file
    OWN = "own"  # what is written is there for this mapping alone, whose pages are copied then


class MemoryFile:
    """Of this process. It lives as long as this object here, and as any mapping elsewhere. Pickled, it is a `ForeignFile`."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        self.fd = os.memfd_create(f"rayltx-{self.token}", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd).atexit = False

    def __reduce__(self) -> tuple[object, ...]:
        return ForeignFile, (os.getpid(), self.fd, self.token)

    def map(self, access: Access = Access.READ) -> mmap.mmap:
        """Its bytes."""
        return _map(self.fd, access)


@dataclass(frozen=True)
class ForeignFile:
    """Another process's. pid, fd: that process's. token: in the file's name, which tells it from a later one of that number."""

    pid: int
    fd: int
    token: str

    def map(self, access: Access = Access.READ, content: int | None = None) -> mmap.mmap:
        """As `MemoryFile.map`. Raises ClusterError where the file is gone, or not for this process.

        content: of a segment, whose bytes are then left as they are for as long as the mapping lives. Raises ClusterError where
        others have come in their place.
        """
        path = f"/proc/{self.pid}/fd/{self.fd}"
        try:
            own = os.open(path, os.O_RDWR if access is Access.WRITE else os.O_RDONLY)
            try:
                if self.token not in os.readlink(f"/proc/self/fd/{own}"):
                    raise FileNotFoundError(path)
                if content is not None:
                    # Of this opening of the file, which a mapping of Python's keeps until it is gone. Refused only while
                    # others are being written.
                    fcntl.flock(own, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    if os.pread(own, _HEADER.size, 0) != _HEADER.pack(content):
                        raise FileNotFoundError(f"other bytes are in {path}")
                return _map(own, access)
            finally:
                os.close(own)
        except OSError as error:
            raise ClusterError(
                f"what process {self.pid} has shared is gone, or is not for this process ({error}); workers need to be of the "
                "user and in the container of the process that started them"
            ) from error


class Segment(MemoryFile):
    """Some arrays' bytes, one after another, behind a number that is another each time they are written."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """parts: (bytes,) uint8 each; copied."""
        super().__init__()
        self.sizes = [part.nbytes for part in parts]
        self.offsets: list[int] = []
        self._given: list[weakref.ref[SharedBytes]] = []
        self._mapping: mmap.mmap | None = None  # to write to: only of pages that are there
        end = _ALIGNMENT  # behind the number
        for size in self.sizes:
            self.offsets.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        os.ftruncate(self.fd, end)
        self._renew_content()
        for part, offset in zip(parts, self.offsets):
            _write(self.fd, part, offset)

    def _renew_content(self) -> None:
        self.content = secrets.randbits(63)
        os.pwrite(self.fd, _HEADER.pack(self.content), 0)

    def rewrite(self, parts: Sequence[np.ndarray]) -> bool:
        """Put others of the same sizes in their place. Returns False, and does nothing, where somebody may still want those that
        are there.

        That is who has them of `parts`, here, and every process that maps them, which holds a lock until its last tensor on them
        is gone or it has ended itself. Who comes too late to map them finds another number, and raises.
        """
        self._given = [each for each in self._given if each() is not None]
        if self._given or [part.nbytes for part in parts] != self.sizes:
            return False
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            self._renew_content()
            # Through a mapping, which takes half of what writing to the file does once its pages are there.
            self._mapping = self._mapping or self.map(Access.WRITE)
            for part, offset in zip(parts, self.offsets):
                np.frombuffer(self._mapping, np.uint8, part.nbytes, offset)[:] = part
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        return True

    def parts(self) -> list[SharedBytes]:
        """For others to map. The bytes stay for as long as these here live."""
        given = [SharedBytes(self, offset, size, self.content) for offset, size in zip(self.offsets, self.sizes)]
        self._given += map(weakref.ref, given)
        return given

    def views(self) -> list[np.ndarray]:
        """(bytes,) uint8 each, for the owner to read: they show what `rewrite` writes."""
        whole = self.map()
        return [np.frombuffer(whole, np.uint8, size, offset) for offset, size in zip(self.offsets, self.sizes)]


@dataclass(frozen=True)
class SharedBytes:
    """Some of a segment's bytes. Crosses to other processes of this machine by pickling."""

    segment: Segment | ForeignFile
    offset: int
    nbytes: int
    content: int  # the number in front of them

    def array(self, mapped: dict[int, mmap.mmap] | None = None, access: Access = Access.READ) -> np.ndarray:
        """(bytes,) uint8 on the shared bytes. It keeps the mapping alive, and the bytes as they are.

        mapped: the segments that have been mapped so, by id, for several parts of one.
        """
        mapped = {} if mapped is None else mapped
        whole = mapped.get(id(self.segment))
        if whole is None:
            file = self.segment
            if isinstance(file, Segment):  # from outside as well, with a lock
                file = ForeignFile(os.getpid(), file.fd, file.token)
            whole = mapped[id(self.segment)] = file.map(access, self.content)
        return np.frombuffer(whole, np.uint8, self.nbytes, self.offset)


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
