"""Sizes of LTX latents, and the positions of their tokens.

Letters in shapes: T video tokens, A audio tokens. A token is one latent position: token (f, h, w) has the index
(f * height + h) * width + w, so the tokens of a latent frame are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayltx.errors import InputError

AUDIO_TOKENS_PER_S = 25.0
VIDEO_SCALE = (8, 32, 32)  # pixel frames, rows and columns that one latent position stands for


@dataclass(frozen=True)
class LatentShape:
    """Size of a video latent, in latent frames, rows and columns."""

    frames: int
    height: int
    width: int

    @classmethod
    def from_pixels(cls, width: int, height: int, pixel_frames: int) -> LatentShape:
        """The latent of a video. Raises InputError unless sizes are multiples of 32 and frames 8k + 1."""
        for name, value in (("width", width), ("height", height)):
            if value <= 0 or value % 32:
                near = max(32, round(value / 32) * 32)
                raise InputError(f"{name}={value} must be a positive multiple of 32; try {near}")
        if pixel_frames <= 0 or pixel_frames % 8 != 1:
            near = max(1, round((pixel_frames - 1) / 8) * 8 + 1)
            raise InputError(f"frames={pixel_frames} must be 8k + 1 (1, 9, 17, ...); try {near}")
        return cls((pixel_frames - 1) // 8 + 1, height // 32, width // 32)

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def pixel_frames(self) -> int:
        return (self.frames - 1) * VIDEO_SCALE[0] + 1

    def audio_tokens(self, frame_rate: float = 24.0) -> int:
        """Of sound as long as the video."""
        return max(1, round(self.pixel_frames / frame_rate * AUDIO_TOKENS_PER_S))


def video_positions(
    shape: LatentShape,
    frame_rate: float,
    causal: bool,
    tokens: slice = slice(None),
    device: torch.device | None = None,
) -> Tensor:
    """Where video tokens begin and end in time and space.

    tokens: which of the T tokens; positions of others are never computed.
    causal: the first latent frame stands for one pixel frame, so that later ones begin 7 frames earlier than 8 f.
    Returns (3, tokens, 2) float32: seconds, pixel row and pixel column, each as [start, end).
    Source: LTX-Video, arXiv 2501.00103, section 2.2; the causal offset as in Lightricks' LTX-2 code.
    """
    index = torch.arange(shape.num_tokens, device=device)[tokens]
    frame = torch.div(index, shape.tokens_per_frame, rounding_mode="floor")
    row = torch.div(index, shape.width, rounding_mode="floor") % shape.height
    column = index % shape.width
    start = torch.stack([frame, row, column]).float()
    scale = torch.tensor(VIDEO_SCALE, dtype=torch.float32, device=device)[:, None, None]
    bounds = torch.stack([start, start + 1.0], dim=-1) * scale
    if causal:
        bounds[0] = (bounds[0] + 1.0 - VIDEO_SCALE[0]).clamp(min=0.0)
    bounds[0] /= frame_rate
    return bounds
