"""What `rayltx generate` is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rayltx.cli.cluster_options import ClusterOptions
from rayltx.cli.outputs import PIXEL_SUFFIXES, VIDEO_SUFFIX
from rayltx.diffusion_models.lightricks.vae_checkpoint import AUDIO, VIDEO, holds_vae, open_vae
from rayltx.errors import InputError
from rayltx.whole_files import check_is_file

Sides: TypeAlias = tuple[
    dict[str, Any], dict[str, Any] | None
]  # positive and negative conditioning; see `conditioning.py`

_LEAST_FRAME_RATE = 0.01
_MOST_ENCODERS = 2  # files that ComfyUI makes one text encoder of LTX's from
_SEEDS = 2**64  # how many there are, in ComfyUI too


@dataclass(frozen=True)
class GenerateOptions:
    checkpoint: Path | None
    prompt: str | None
    negative: str
    conditioning: Path | None
    text_encoders: list[Path]
    vae: Path | None
    audio_vae: Path | None
    width: int
    height: int
    frames: int
    frame_rate: float
    steps: int
    sigmas: str | None
    cfg: float
    stochastic: bool
    seed: int
    chunks: int
    dtype: str
    outputs: list[Path]
    verify: bool
    comfyui: Path | None
    cluster: ClusterOptions

    @property
    def wants_pixels(self) -> bool:
        return any(path.suffix.lower() in PIXEL_SUFFIXES for path in self.outputs)

    @property
    def stochastic_seed(self) -> int | None:
        """Of the noise of the steps, which is other than that which they begin with; None where they have none."""
        return (self.seed + 1) % (_SEEDS - 1) if self.stochastic else None  # ComfyUI adds another 1

    def check(self) -> None:
        """Raises InputError for what can be no clip's, and for files that are not there or hold something else."""
        if not _LEAST_FRAME_RATE <= self.frame_rate < math.inf:
            raise InputError(f"frame-rate={self.frame_rate} must be a positive number, at least {_LEAST_FRAME_RATE}")
        if not math.isfinite(self.cfg):
            raise InputError(f"cfg={self.cfg} must be a number")
        if not 0 <= self.seed < _SEEDS:
            raise InputError(f"seed={self.seed} must be from 0 to {_SEEDS - 1}")
        if self.chunks < 0:
            raise InputError(f"chunks={self.chunks} must be 0 (automatic) or more")
        if self.prompt is not None and self.conditioning is not None:
            raise InputError("prompt and conditioning are two ways to say the same; give one of them")
        of_comfyui = {"text-encoder": self.text_encoders, "vae": self.vae, "audio-vae": self.audio_vae}
        for name, value in of_comfyui.items():
            if value and self.comfyui is None:
                raise InputError(f"{name}: is run by ComfyUI's code; say where it is (--comfyui FOLDER)")
        if self.text_encoders and self.conditioning is not None:
            raise InputError("text-encoder and conditioning are two ways to give the text; use one of them")
        if self.negative and not self.text_encoders:
            raise InputError("negative: is read by a text encoder (--text-encoder FILE)")
        if len(self.text_encoders) > _MOST_ENCODERS:
            raise InputError(
                f"text-encoder: {len(self.text_encoders)} files; one of LTX's is in {_MOST_ENCODERS} at most"
            )
        for path in self.text_encoders:
            check_is_file(path)
        for file, part in ((self.vae, VIDEO), (self.audio_vae, AUDIO)):
            if file is not None:
                open_vae(file, part)

    @property
    def wants_sound(self) -> bool:
        return any(path.suffix.lower() == VIDEO_SUFFIX for path in self.outputs)

    def has_vae(self, checkpoint: str) -> bool:
        """Whether there is one that ComfyUI could decode by: given, or in the checkpoint."""
        return self.vae is not None or holds_vae(checkpoint)

    def sound_source(self, checkpoint: str) -> Path | None:
        """Where the VAE of sound is; None where there is none."""
        if self.audio_vae is not None:
            return self.audio_vae
        return Path(checkpoint) if holds_vae(checkpoint, AUDIO) else None
