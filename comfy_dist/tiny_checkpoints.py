"""Tiny random checkpoints of every LTX version, made with the installed ComfyUI's own classes: for checks and tests."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rayltx.diffusion_models.lightricks.checkpoint import OFFICIAL_PREFIX
from rayltx.diffusion_models.lightricks.random_weights import randomise
from rayltx.diffusion_models.lightricks.tiny_configs import COMFYUI_CONFIGS


def model_class(version: str) -> Any:
    """ComfyUI's class for a version of the model."""
    if version == "LTX-Video":
        return importlib.import_module("comfy.ldm.lightricks.model").LTXVModel
    return importlib.import_module("comfy.ldm.lightricks.av_model").LTXAVModel


def known_versions() -> list[str]:
    """The versions that this ComfyUI has: it ignores settings that it does not know."""
    found = importlib.import_module("comfy.ldm.lightricks.model").LTXBaseModel
    newer = {"LTX-2.3": "cross_attention_adaln", "LTX-2.5": "ff_bias"}
    parameters = inspect.signature(found.__init__).parameters
    return [version for version in COMFYUI_CONFIGS if newer.get(version, "in_channels") in parameters]


def save_tiny_checkpoint(
    path: Path, version: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> None:
    """Write a checkpoint in the official format, text connector included. changes: to the configuration."""
    import comfy.ops

    config = {**COMFYUI_CONFIGS[version], **changes}
    model = model_class(version)(**config, dtype=dtype, device="cpu", operations=comfy.ops.disable_weight_init)
    randomise(model, seed)
    tensors = {OFFICIAL_PREFIX + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"config": json.dumps({"transformer": config})})
