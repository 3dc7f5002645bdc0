"""What the LoRA nodes hand to the loaders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraFile:
    path: str
    strength: float
