"""How a MODEL of ours is told from others, without importing Ray."""

from __future__ import annotations

from typing import Any

LINK = "rayltx_link"  # the attribute of the diffusion model that leads to the workers


def is_twin(model: Any) -> bool:
    """Whether a MODEL's weights are with the workers."""
    return hasattr(getattr(model.model, "diffusion_model", None), LINK)
