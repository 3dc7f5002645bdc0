"""Tensors of the host's memory on a device: moved once for as long as they stay the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], obj: Any) -> Any:
    """The same containers with what a function gives for their tensors."""
    if isinstance(obj, Tensor):
        return function(obj)
    if isinstance(obj, dict):
        return {key: map_tensors(function, value) for key, value in obj.items()}
    if type(obj) in (list, tuple):
        return type(obj)(map_tensors(function, value) for value in obj)
    return obj


@dataclass
class _Copy:
    source: weakref.ref[Tensor]
    source_version: int
    tensor: Tensor | None = None  # None: the source has been asked for once
    version: int = 0


class DeviceCopies:
    """Of one model on one device.

    It owns the copies. One is kept when its source is asked for a second time, since what comes once, as a step's latent does,
    does not come again. It goes with its source; when either has been written to; and with `clear`.
    """

    def __init__(self, device: torch.device, max_bytes: int = 512 * 2**20) -> None:
        """max_bytes: of the copies that are kept. The others are made each time."""
        self._device, self._max_bytes = device, max_bytes
        self._copies: dict[tuple[int, torch.dtype], _Copy] = {}  # by the source's id and the copy's dtype

    def of(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the device, in a dtype. It may be written to: then the next one is made anew."""
        dtype = tensor.dtype if dtype is None else dtype
        is_there = tensor.device == self._device and tensor.dtype == dtype
        if is_there or tensor.is_inference():  # whose versions are not counted
            return tensor.to(self._device, dtype)
        key = id(tensor), dtype
        known = self._copies.get(key)
        if known is None or known.source() is not tensor or known.source_version != tensor._version:  # noqa: SLF001
            source = weakref.ref(tensor, lambda _: self._copies.pop(key, None))
            self._copies[key] = _Copy(source, tensor._version)  # noqa: SLF001
            return tensor.to(self._device, dtype)
        if known.tensor is not None and known.tensor._version == known.version:  # noqa: SLF001
            return known.tensor
        known.tensor = None
        with torch.inference_mode(False):  # for its versions to be counted, also of views and in inference mode
            made = tensor.to(self._device, dtype)
        if self.num_bytes + made.nbytes <= self._max_bytes:
            known.tensor, known.version = made, made._version  # noqa: SLF001
        return made

    def in_containers(self, obj: Any) -> Any:
        """The same containers with their tensors on the device."""
        return map_tensors(self.of, obj)

    @property
    def num_bytes(self) -> int:
        return sum(copy.tensor.nbytes for copy in self._copies.values() if copy.tensor is not None)

    def clear(self) -> None:
        """Give the device's memory back."""
        self._copies.clear()
