"""How large Ray's object store may be, and how much of it weights take."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil

from rayltx.errors import DeviceError

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
MIN_BYTES = 80 * 2**20  # Ray starts with no less than 75 MiB
_SHARE_OF_SHARED_MEMORY = 0.9
_SHARE_OF_MEMORY = 0.6
# Left free for the latents and conditionings of the steps under way.
STEP_RESERVE_BYTES = 512 * 2**20


def object_store_bytes(
    requested: int, kept_free: int = 0, shared_memory_free: int | None = None, memory: int | None = None
) -> int:
    """Size of the object store in bytes.

    kept_free: bytes of shared memory that others need.

    requested: 0 chooses nine tenths of what is free in shared memory, and at most six tenths of the machine's memory.
    The store takes memory as it fills, not when it is made, so a large one costs nothing.
    Raises DeviceError for a request that shared memory cannot hold: Ray would put the store on a disk, silently.
    """
    if shared_memory_free is None:
        shared_memory_free = (
            shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else psutil.virtual_memory().available
        )
    in_shared_memory, shared_memory_free = shared_memory_free, max(0, shared_memory_free - kept_free)
    if memory is None:
        memory = psutil.virtual_memory().total
    if requested:
        if requested < MIN_BYTES:
            raise DeviceError(
                f"an object store of {requested / 2**20:.0f} MiB is too small: Ray needs at least "
                f"{MIN_BYTES / 2**20:.0f} MiB; use 0 to choose automatically"
            )
        if requested > shared_memory_free:
            raise DeviceError(
                f"an object store of {requested / 2**30:.2f} GiB does not fit into shared memory: {SHARED_MEMORY} has "
                f"{shared_memory_free / 2**30:.2f} GiB free for it; ask for less, use 0 to choose automatically, or enlarge "
                f"{SHARED_MEMORY} (in a container: --shm-size)"
            )
        return requested
    automatic = int(min(_SHARE_OF_SHARED_MEMORY * shared_memory_free, _SHARE_OF_MEMORY * memory))
    if automatic < MIN_BYTES:
        logger.warning(
            "%s has only %.0f MiB free: weights will be mapped from their files, and Ray may keep its store on disk; "
            "enlarge it (in a container: --shm-size)",
            SHARED_MEMORY,
            in_shared_memory / 2**20,
        )
    return max(automatic, MIN_BYTES)


def fits_object_store(weight_bytes: int, store_bytes: int, held_bytes: int) -> bool:
    """Whether weights can be put next to `held_bytes` of other weights, and leave room for the steps."""
    return weight_bytes + held_bytes + min(STEP_RESERVE_BYTES, store_bytes // 4) <= store_bytes


class StoreBudget:
    """The object store's size, and what models' weights hold of it."""

    def __init__(self, total_bytes: Callable[[], int]) -> None:
        """total_bytes: gives the size. It may wait for Ray to have started."""
        self._total_bytes = total_bytes
        self._held: dict[str, int] = {}  # by model

    @property
    def total_bytes(self) -> int:
        return self._total_bytes()

    @property
    def held_bytes(self) -> int:
        return sum(self._held.values())

    def fits(self, weight_bytes: int) -> bool:
        """Whether weights can be put next to those that are there."""
        return fits_object_store(weight_bytes, self.total_bytes, self.held_bytes)

    def hold(self, model_id: str, num_bytes: int) -> None:
        self._held[model_id] = num_bytes

    def let_go(self, model_id: str) -> None:
        self._held.pop(model_id, None)
