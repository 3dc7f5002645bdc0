"""Synthetic clips for the demo checkpoint: one coloured shape that moves in a straight line.

Letters in shapes: F pixel frames, H and W pixel height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.16, 0.14),
    "green": (0.18, 0.78, 0.25),
    "blue": (0.16, 0.36, 0.95),
    "yellow": (0.96, 0.85, 0.15),
    "magenta": (0.88, 0.20, 0.82),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS: dict[str, tuple[float, float]] = {  # unit vectors, x to the right, y down
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
BACKGROUND = (0.09, 0.10, 0.14)


@dataclass(frozen=True)
class Scene:
    """What a clip shows. The names are keys of COLOURS, members of SHAPES and keys of MOTIONS."""

    colour: str
    shape: str
    motion: str


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels from the outline of a shape centred at the origin, negative inside.

    x, y: any broadcastable shapes, pixels; radius: pixels, half the height of the shape.
    Exact on the outline and close to it, which is all that anti-aliasing needs.
    """
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * radius
    if shape == "triangle":  # upright, equal sides; 0.866 = cos 30 degrees
        side = 0.866 * x.abs() - 0.5 * y - 0.5 * radius
        return torch.maximum(side, y - 0.5 * radius * 1.2)
    raise ValueError(f"shape={shape!r} is not one of {', '.join(SHAPES)}")


def render_clip(scene: Scene, pixel_frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw a clip. Where the path begins and lies is random, so that the model learns a distribution and not a lookup.

    Returns (F, H, W, 3) float32 in [0, 1]. The whole shape stays inside the picture in every frame.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    radius = 0.22 * min(height, width)
    dx, dy = MOTIONS[scene.motion]
    room = (height if dx == 0 else width) - 2.0 * radius
    travel = 0.85 * room
    start_along = radius + uniform(0.0, room - travel)
    across = radius + uniform(0.25, 0.75) * ((width if dx == 0 else height) - 2.0 * radius)

    along = start_along + travel * torch.linspace(0.0, 1.0, pixel_frames)
    if dx + dy < 0:
        along = (height if dx == 0 else width) - along
    centre_x, centre_y = (along, torch.full_like(along, across)) if dx != 0 else (torch.full_like(along, across), along)

    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    distance = signed_distance(
        scene.shape, x - centre_x[:, None, None], y - centre_y[:, None, None], torch.tensor(radius)
    )
    coverage = (0.5 - distance).clamp(0.0, 1.0)[..., None]  # one pixel of anti-aliasing
    return coverage * torch.tensor(COLOURS[scene.colour]) + (1.0 - coverage) * torch.tensor(BACKGROUND)
