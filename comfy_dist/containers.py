"""Tensors within containers."""

from __future__ import annotations

from typing import Any

import torch

from rayltx.device_copies import map_tensors


def to_device(obj: Any, device: torch.device) -> Any:
    """The same containers with their tensors on a device."""
    return map_tensors(lambda tensor: tensor.to(device), obj)
