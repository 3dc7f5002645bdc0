"""Which GPU each worker gets."""

from __future__ import annotations

import math
import re

from rayltx.errors import DeviceError, ParallelConfigError

_EVEN = "even"
_INDEX_LIST = re.compile(r"\s*\d+\s*(,\s*\d+\s*)*,?\s*")


def parse_gpu_indices(text: str) -> tuple[int, ...]:
    """Indices from a list such as "0,2"; () for an empty one. Raises DeviceError for anything else, and for repeats."""
    if not text.strip():
        return ()
    if not _INDEX_LIST.fullmatch(text):
        raise DeviceError(f'gpu_indices="{text}" must be GPU numbers separated by commas, such as "0,2"')
    indices = tuple(int(part) for part in text.split(",") if part.strip())
    if len(set(indices)) < len(indices):
        raise DeviceError(f'gpu_indices="{text}" names a GPU twice; each worker needs its own')
    return indices


def parse_shares(name: str, text: str, workers: int) -> tuple[float, ...]:
    """How much of the work each worker gets, from a list such as "3, 2"; "even" for all alike; () for an empty one.

    name: of what was given, for messages. Raises ParallelConfigError for anything else.
    """
    if not text.strip():
        return ()
    if text.strip() == _EVEN:
        return (1.0,) * workers
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) != workers or not all(0 < share < math.inf for share in shares):
        raise ParallelConfigError(
            f'{name}="{text}" must be {workers} numbers above 0 separated by commas, one for each worker, such as '
            f'"{", ".join(["3", *["2"] * (workers - 1)])}"; or "{_EVEN}"; or empty, to go by the speed of unlike cards'
        )
    return shares


def assign_gpus(workers: int, indices: tuple[int, ...], visible: tuple[str, ...]) -> tuple[str, ...]:
    """The value of CUDA_VISIBLE_DEVICES for each worker.

    indices: which of the visible devices to use, in this order; () for the first ones. They count within what this
    process sees: index 0 of CUDA_VISIBLE_DEVICES=4,5 is GPU 4.
    Raises DeviceError where an index does not exist or there are too few.
    """
    for index in indices:
        if index >= len(visible):
            raise DeviceError(
                f"GPU index {index} does not exist: {len(visible)} GPU(s) are visible here, numbered from 0"
                + (f" to {len(visible) - 1}" if visible else "; to run on the CPU, choose the device cpu")
            )
    chosen = tuple(visible[index] for index in indices) if indices else visible
    if workers > len(chosen):
        where = f"gpu_indices names {len(chosen)}" if indices else f"{len(chosen)} are visible here"
        raise DeviceError(
            f"workers={workers} need a GPU each, but {where}; use at most {len(chosen)}, or the device cpu"
        )
    return chosen[:workers]


def without_async_allocator(config: str) -> str:
    """PyTorch's allocator settings (PYTORCH_CUDA_ALLOC_CONF) for a worker.

    ComfyUI chooses cudaMallocAsync for its own process; next to NCCL's buffers that runs out of memory, so a worker
    gets the setting without its `backend`.
    """
    return ",".join(part for part in config.split(",") if part and not part.strip().startswith("backend"))
