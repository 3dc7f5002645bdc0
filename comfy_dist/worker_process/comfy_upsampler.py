"""ComfyUI's upsampler of latents on one worker, on weights that all workers share.

It takes the mean and the spread of its features over the whole picture (GroupNorm), so that tiles of it give another one.
"""

from __future__ import annotations

import math

import comfy.model_management as management
import torch
from torch import Tensor, nn

from rayltx.comfy_dist.upsampler_building import build_upsampler
from rayltx.comfy_dist.upsampler_host import UpsamplerHost, UpsamplerSpec
from rayltx.comfy_dist.worker_process.auxiliary_model import AuxiliaryModel
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup

_BYTES_PER_NUMBER = 3000.0  # of memory that a call takes for each of its input, by ComfyUI's own reckoning


class ComfyUpsampler(AuxiliaryModel, UpsamplerHost):
    """What it can be asked is described in `UpsamplerHost`."""

    def __init__(self, spec: UpsamplerSpec, device: str) -> None:
        super().__init__()
        self._spec = spec

    def _build(self) -> nn.Module:
        return build_upsampler(self._given, self._spec.config, self._spec.dtype)

    def _device(self) -> torch.device:
        return management.get_torch_device()

    def forward(self, group: SequenceParallelGroup, inputs: object) -> None:
        raise InputError("an upsampler of latents runs on one worker")

    def upsample(self, latent: Tensor) -> Tensor:
        assert self._patcher is not None
        with torch.inference_mode():
            needed = math.prod(latent.shape) * _BYTES_PER_NUMBER
            management.load_models_gpu([self._patcher], memory_required=needed)
            return self._patcher.model(latent.to(self._device())).cpu()
