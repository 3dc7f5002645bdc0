"""The state of a device's own random generator, from which some decoders draw noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rayltx.devices import CPU


def random_state(device: torch.device) -> Tensor:
    """(bytes,) uint8."""
    if device.type == CPU:
        return torch.get_rng_state()
    return _of(device).get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """The reverse."""
    if device.type == CPU:
        torch.set_rng_state(state)
    else:
        _of(device).set_rng_state(state, device)


def _of(device: torch.device) -> Any:
    return getattr(torch, device.type)
