"""ComfyUI's upsampler of latents as both processes build it: on tensors that it is given, none of which it copies."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_types import UpsamplerModel
from rayltx.comfy_dist.given_tensors import on_given_tensors


def build_upsampler(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> UpsamplerModel:
    """ComfyUI's upsampler, whose parameters are the given tensors, wherever they are. dtype: theirs.

    Raises what torch raises for tensors of other names or shapes than the config says.
    """
    import comfy.ops
    from comfy.ldm.lightricks.latent_upsampler import LatentUpsampler

    known = inspect.signature(LatentUpsampler.from_config).parameters  # ComfyUI 0.29 began to hand it its layers
    operations = {"operations": comfy.ops.disable_weight_init} if "operations" in known else {}
    with on_given_tensors():
        model = LatentUpsampler.from_config(config, **operations).to(dtype)
        model.load_state_dict(dict(tensors))
    return model
