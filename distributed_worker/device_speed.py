"""How fast a device multiplies, and what shares of the work unlike devices get by it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from rayltx.devices import CPU, DeviceKind

_MATRIX, _PRODUCTS, _REPEATS = 2048, 2, 5  # on the CPU
_GPU_MATRIX, _GPU_PRODUCTS = 8192, 10  # for a launch to count for nothing
_STEPS = 20  # of a share: finer than what a measurement is worth


def flops_per_s(kind: DeviceKind) -> float:
    """Of large matrix products on the first device, in what LTX models compute in there."""
    dtype = torch.float32 if kind.name == CPU else torch.bfloat16
    size, products = (_MATRIX, _PRODUCTS) if kind.name == CPU else (_GPU_MATRIX, _GPU_PRODUCTS)
    matrix = torch.ones(size, size, dtype=dtype, device=kind.name)
    out, best = torch.empty_like(matrix), float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        for _ in range(products):
            torch.matmul(matrix, matrix, out=out)
        out[0, 0].item()
        best = min(best, time.perf_counter() - started)
    del matrix, out
    kind.give_back_memory()
    return 2 * products * size**3 / best


def shares_by_speed(speeds: Sequence[float]) -> tuple[float, ...]:
    """In twentieths of the fastest device's; () where all come out alike."""
    shares = tuple(max(1, round(_STEPS * speed / max(speeds))) / _STEPS for speed in speeds)
    return () if len(set(shares)) == 1 else shares
