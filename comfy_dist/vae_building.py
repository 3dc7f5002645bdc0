"""ComfyUI's VAE as both processes build it: on tensors that it is given, none of which it copies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_types import VAE
from rayltx.comfy_dist.given_tensors import on_given_tensors


def build_vae(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None) -> VAE:
    """ComfyUI's VAE, whose parameters are the given tensors, wherever they are.

    tensors: by their names in the file, without a prefix of the whole VAE. dtype: None leaves it to ComfyUI.
    Its `first_stage_model` is None where ComfyUI knows no VAE with such tensors.
    """
    import comfy.sd

    with on_given_tensors():
        return comfy.sd.VAE(sd=dict(tensors), metadata=dict(metadata) or None, dtype=dtype)
