"""Tensors within containers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(obj: Any, device: torch.device) -> Any:
    """The same containers with their tensors on a device."""
    if isinstance(obj, Tensor):
        return obj.to(device)
    if isinstance(obj, dict):
        return {key: to_device(value, device) for key, value in obj.items()}
    if type(obj) in (list, tuple):
        return type(obj)(to_device(value, device) for value in obj)
    return obj
