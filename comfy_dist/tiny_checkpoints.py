"""Tiny random checkpoints of every LTX version, made with the installed ComfyUI's own classes: for checks and tests."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rayltx.diffusion_models.lightricks.random_weights import randomise

_VIDEO = {
    "in_channels": 128, "attention_head_dim": 24, "num_attention_heads": 4, "cross_attention_dim": 96,
    "caption_channels": 48, "num_layers": 2, "causal_temporal_positioning": True, "vae_scale_factors": [8, 32, 32],
    "positional_embedding_max_pos": [20, 2048, 2048], "timestep_scale_multiplier": 1000.0,
}  # fmt: skip
_AUDIO_VIDEO = {
    **_VIDEO, "audio_in_channels": 128, "audio_cross_attention_dim": 64, "audio_attention_head_dim": 16,
    "audio_num_attention_heads": 4, "use_middle_indices_grid": True, "rope_type": "split",
    "frequencies_precision": "float64", "av_ca_timestep_scale_multiplier": 1000.0, "connector_attention_head_dim": 12,
    "connector_num_attention_heads": 4, "connector_num_layers": 1,
}  # fmt: skip
_LTX_2_3 = {
    **_AUDIO_VIDEO, "apply_gated_attention": True, "connector_apply_gated_attention": True,
    "cross_attention_adaln": True, "caption_proj_before_connector": True, "connector_attention_head_dim": 24,
    "audio_connector_attention_head_dim": 16, "audio_connector_num_attention_heads": 4,
}  # fmt: skip
CONFIGS = {
    "LTX-Video": _VIDEO,
    "LTX-2": _AUDIO_VIDEO,
    "LTX-2.3": _LTX_2_3,
    "LTX-2.5": {**_LTX_2_3, "ff_bias": False, "use_keyframes_abs_pos_embedding": True},
}


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
    return [version for version in CONFIGS if newer.get(version, "in_channels") in parameters]


def save_tiny_checkpoint(
    path: Path, version: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> None:
    """Write a checkpoint in the official format, text connector included. changes: to the configuration."""
    import comfy.ops

    config = {**CONFIGS[version], **changes}
    model = model_class(version)(**config, dtype=dtype, device="cpu", operations=comfy.ops.disable_weight_init)
    randomise(model, seed)
    tensors = {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"config": json.dumps({"transformer": config})})
