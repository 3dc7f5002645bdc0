"""What `rayltx generate` has made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sound:
    waveform: Tensor  # (channels, samples) in [-1, 1]
    sample_rate: int  # a second


@dataclass(frozen=True)
class Generated:
    latents: dict[str, Tensor]  # "video" (1, C, f, h, w), and "audio" (1, 8, tokens, 16) where there is sound
    sigmas: Tensor
    clip: Tensor | None = None  # (pixel frames, height, width, 3) in [0, 1]; None: not decoded
    sound: Sound | None = None
