"""Views on the object store that no one can write through.

Ray marks the arrays that it maps from its object store as read-only, but the pages underneath are mapped writable in
every process: torch, which ignores the mark, would write straight into what all workers share, and into what the next
one will read. So the pages are protected for as long as a view on them lives. A stray write then kills the process
that made it, and no one else's numbers.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import weakref
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from rayltx.devices import DeviceKind

logger = logging.getLogger(__name__)

_PROT_READ, _PROT_WRITE = 1, 2


class _Region:
    """Keeps some arrays alive, and the whole pages between the first and the last of their bytes read-only.

    The bytes before the first and after the last whole page stay writable: those pages hold other objects too.
    When the last view is gone, the pages are made writable before the arrays are released, because the store gives
    the memory to other objects then.
    """

    def __init__(self, arrays: list[np.ndarray]) -> None:
        page = mmap.PAGESIZE
        self.start = min((array.ctypes.data for array in arrays), default=0)
        self.stop = max((array.ctypes.data + array.nbytes for array in arrays), default=0)
        first, last = -(-self.start // page) * page, self.stop // page * page
        self._pages = first, max(0, last - first)
        self._registered: list[DeviceKind] = []  # with whose driver
        self._refused: set[str] = set()
        if first < last and _protect(*self._pages, _PROT_READ):
            release = weakref.finalize(self, _release, self._pages, arrays, self.start, self._registered)
            release.atexit = False
        else:
            self._arrays = arrays
        _regions[self.start] = self

    def register(self, kind: DeviceKind) -> bool:
        """Let a kind of devices copy from here by itself. Returns whether its driver takes these pages.

        Drivers refuse pages that cannot be written, so they can be for a moment, in this process.
        """
        if kind in self._registered:
            return True
        if kind.name in self._refused or not self._pages[1]:
            return False
        unprotected = _protect(*self._pages, _PROT_READ | _PROT_WRITE)
        taken = kind.register_host_memory(self.start, self.stop - self.start)
        if unprotected:
            _protect(*self._pages, _PROT_READ)
        if taken:
            self._registered.append(kind)
        else:
            self._refused.add(kind.name)
        return taken


_regions: weakref.WeakValueDictionary[int, _Region] = weakref.WeakValueDictionary()  # by the address of the first byte


def register_pages_of(tensor: Tensor, kind: DeviceKind) -> bool:
    """Let a kind of devices copy by itself from the region that a tensor is a view of.

    Returns whether it can: not from a private mapping of a file, whose pages this would copy, nor where the driver refuses.
    """
    address = tensor.data_ptr()
    for region in list(_regions.values()):
        if region.start <= address and address + tensor.nbytes <= region.stop:
            return region.register(kind)
    return False


def _protect(address: int, length: int, protection: int) -> bool:
    if os.name != "posix":
        return False  # no mprotect: the views stay as Ray maps them
    if libc().mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), protection):
        logger.warning("cannot protect %d bytes of shared weights: %s", length, os.strerror(ctypes.get_errno()))
        return False
    return True


@functools.cache
def libc() -> ctypes.CDLL:
    """For systems that have one by that name."""
    return ctypes.CDLL(None, use_errno=True)


def _release(pages: tuple[int, int], arrays: list[np.ndarray], start: int, registered: list[DeviceKind]) -> None:
    for kind in registered:  # before the store can give the memory to others
        kind.unregister_host_memory(start)
    _protect(*pages, _PROT_READ | _PROT_WRITE)
    arrays.clear()


class _View:
    """What NumPy sees as the owner of a view: holding the view holds the region."""

    def __init__(self, region: _Region, array: np.ndarray) -> None:
        self._region = region
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)  # torch warns of arrays marked read-only; the pages are
        self.__array_interface__ = interface


def protected_views(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Read-only views of the arrays of one object of the store.

    arrays: as `ray.get` returns them, all of one object, so that nothing else lies between them.
    The views own the mapping: it is released when the last of them, or of the tensors made from them, is gone.
    Writing to one raises no exception: it ends the process (SIGSEGV), except within a page of either end.
    """
    filled = [array for array in arrays.values() if array.nbytes]
    region = _Region(filled)
    return {name: np.asarray(_View(region, array)) if array.nbytes else array.copy() for name, array in arrays.items()}
