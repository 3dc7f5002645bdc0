"""Shared pages that a device reads by itself: they are written by no one, but for the moment in which the driver takes them."""

import gc
import mmap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from rayltx.devices import DeviceKind
from rayltx.distributed_worker.shared_pages import protected_views, register_pages_of

MAPS = Path("/proc/self/maps")
pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="needs /proc")


def permissions(address):
    for line in MAPS.read_text().splitlines():
        span, found = line.split()[:2]
        start, stop = (int(part, 16) for part in span.split("-"))
        if start <= address < stop:
            return found
    return None


@dataclass(frozen=True)
class Kind(DeviceKind):
    """Notes what the driver would see."""

    seen: list = field(default_factory=list, compare=False)
    takes: bool = True

    def register_host_memory(self, address, num_bytes):
        self.seen.append(("register", address, num_bytes, permissions(address + num_bytes // 2)))
        return self.takes

    def unregister_host_memory(self, address):
        self.seen.append(("unregister", address, permissions(address + mmap.PAGESIZE)))


@pytest.fixture
def weights():
    """Two tensors on the protected pages of one object, which lies within a mapping as in the object store."""
    mapping = mmap.mmap(-1, 8 * mmap.PAGESIZE)
    store = np.frombuffer(mapping, np.uint8)
    middle = 3 * mmap.PAGESIZE
    arrays = {"a": store[100 : 100 + middle], "b": store[100 + middle : 100 + 2 * middle]}
    yield {name: torch.from_numpy(view) for name, view in protected_views(arrays).items()}, store


def test_pages_are_writable_for_the_driver_alone_and_left_before_they_are_given_back(weights):
    tensors, store = weights
    kind, start = Kind("cuda", "nccl", ""), store.ctypes.data + 100
    inside = start + 2 * mmap.PAGESIZE
    assert permissions(inside) == "r--s"
    assert register_pages_of(tensors["b"], kind) and register_pages_of(tensors["a"], kind)
    # Once, the whole of both, to the byte: what lies next to them belongs to others.
    assert kind.seen == [("register", start, 6 * mmap.PAGESIZE, "rw-s")]
    assert permissions(inside) == "r--s"
    tensors.clear()
    gc.collect()
    assert kind.seen[1:] == [("unregister", start, "r--s")]
    assert permissions(inside) == "rw-s"


def test_a_driver_that_refuses_is_asked_once_and_the_pages_stay_protected(weights):
    tensors, store = weights
    kind = Kind("cuda", "nccl", "", takes=False)
    assert not register_pages_of(tensors["a"], kind) and not register_pages_of(tensors["b"], kind)
    assert len(kind.seen) == 1 and permissions(store.ctypes.data + 2 * mmap.PAGESIZE) == "r--s"
    tensors.clear()
    gc.collect()
    assert len(kind.seen) == 1


def test_memory_that_is_not_of_the_store_is_not_registered(weights):
    """A private mapping of a file would be copied page by page by a driver that wants to write."""
    kind = Kind("cuda", "nccl", "")
    assert not register_pages_of(torch.zeros(mmap.PAGESIZE * 4, dtype=torch.uint8), kind) and kind.seen == []
