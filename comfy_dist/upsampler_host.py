"""What a worker's upsampler of latents can be asked from ComfyUI's process.

`worker_process.comfy_upsampler.ComfyUpsampler` answers. The marks are those of `distributed_worker.worker_calls`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rayltx.comfy_dist.auxiliary_host import AuxiliaryHost
from rayltx.distributed_worker.worker_calls import individual

UPSAMPLER_HOST = "rayltx.comfy_dist.worker_process.comfy_upsampler:ComfyUpsampler"  # what a worker imports


@dataclass(frozen=True)
class UpsamplerSpec:
    """How a worker builds ComfyUI's upsampler. Picklable."""

    config: Mapping[str, Any]  # of the file's metadata
    dtype: torch.dtype  # that it computes in, as ComfyUI's process chose


class UpsamplerHost(AuxiliaryHost, Protocol):
    """ComfyUI's upsampler of latents on one worker."""

    @individual
    def upsample(self, latent: Tensor) -> Tensor:
        """(B, C, f, h, w), not normalised, to more rows and columns, or frames. On the CPU. Raises what the model raises."""
        ...
