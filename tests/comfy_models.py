"""ComfyUI's LTX models in small, for the tests: configurations, and files in the official format."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

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


def set_up_comfyui(path: str) -> None:
    """Make `comfy` importable, on the CPU, with default arguments."""
    if path not in sys.path:
        sys.path.insert(0, path)
    import comfy.options  # noqa: F401  (with argument parsing left off)
    from comfy.cli_args import args

    args.cpu = True


def model_class(version: str):
    if version == "LTX-Video":
        return importlib.import_module("comfy.ldm.lightricks.model").LTXVModel
    return importlib.import_module("comfy.ldm.lightricks.av_model").LTXAVModel


def quantise(path: Path, scaled: bool) -> None:
    """Make the block's matrices of a checkpoint fp8, as they are, or with a scale for each (ComfyUI's first format)."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name in [
        name for name in tensors if "transformer_blocks" in name and tensors[name].ndim == 2 and "table" not in name
    ]:
        weight = tensors[name].float()
        if scaled:
            scale = weight.abs().max() / 448.0
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale.reshape(1)
        else:
            tensors[name] = weight.to(torch.float8_e4m3fn)
    if scaled:
        tensors["model.diffusion_model.scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    else:
        tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata=metadata)


def save_checkpoint(path: Path, version: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> None:
    """A tiny random checkpoint in the official format, text connector included. changes: to the configuration."""
    import math

    import comfy.ops
    from safetensors.torch import save_file

    config = {**CONFIGS[version], **changes}
    model = model_class(version)(**config, dtype=torch.float32, device="meta", operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.state_dict().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and "table" not in name:
            noise /= math.sqrt(parameter.shape[-1])
        elif "norm" in name:
            noise = 1.0 + 0.1 * noise
        else:
            noise *= 0.2
        tensors[f"model.diffusion_model.{name}"] = noise.to(dtype).contiguous()
    save_file(tensors, path, metadata={"config": json.dumps({"transformer": config})})
