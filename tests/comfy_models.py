"""ComfyUI's LTX models in small, for the tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from rayltx.comfy_dist.tiny_checkpoints import model_class, save_tiny_checkpoint  # noqa: F401
from rayltx.diffusion_models.lightricks.checkpoint import OFFICIAL_PREFIX
from rayltx.diffusion_models.lightricks.random_weights import randomise
from rayltx.diffusion_models.lightricks.tiny_configs import COMFYUI_CONFIGS as CONFIGS  # noqa: F401


def slow(*values):
    """Parameters of a test that are left to `-m slow`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# The one that has most of what the others have each time; those with `-m slow`.
VERSIONS = ["LTX-2.3", *slow("LTX-Video", "LTX-2", "LTX-2.5")]


# A VAE of LTX's kind, with few channels: 8 x 32 x 32 pixels a latent, as all of them.
_RES = ["res_x", {"num_layers": 1, "inject_noise": False}]
_UP = ["compress_all", {"residual": True, "multiplier": 2}]
VAE_CONFIG = {
    "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128,
    "encoder_base_channels": 8, "decoder_base_channels": 8, "patch_size": 4, "norm_layer": "pixel_norm",
    "encoder_blocks": [*[["compress_all", {}]] * 3, _RES], "decoder_blocks": [_RES, _UP, _UP, _UP, _RES],
    "scaling_factor": 1.0, "latent_log_var": "uniform", "use_quant_conv": False, "causal_decoder": False,
    "timestep_conditioning": False,
}  # fmt: skip


def save_tiny_bundle(path: Path, version: str) -> None:
    """A checkpoint in one file, as Load Checkpoint takes it: the transformer, and the VAE next to it."""
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    save_tiny_checkpoint(path, version)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    model = VideoVAE(config=VAE_CONFIG)
    randomise(model, 0)
    vae = model.state_dict()
    vae["per_channel_statistics.std-of-means"] = torch.ones(128)
    vae["per_channel_statistics.mean-of-means"] = torch.zeros(128)
    tensors = {**load_file(path), **{f"vae.{name}": tensor.contiguous() for name, tensor in vae.items()}}
    save_file(tensors, path, metadata={"config": json.dumps({**config, "vae": VAE_CONFIG})})


def save_tiny_upscaler(path: Path) -> None:
    """A latent upscaler of LTX's kind, to twice the rows and columns."""
    import comfy.ops
    from comfy.ldm.lightricks.latent_upsampler import LatentUpsampler
    from safetensors.torch import save_file

    config = {"in_channels": 128, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3, "spatial_upsample": True}
    model = LatentUpsampler.from_config(config, operations=comfy.ops.disable_weight_init)
    randomise(model, 0)
    save_file(model.state_dict(), path, metadata={"config": json.dumps(config)})


def set_up_comfyui(path: str) -> None:
    """Make `comfy` importable, on the CPU, with default arguments."""
    if path not in sys.path:
        sys.path.insert(0, path)
    import comfy.options  # noqa: F401  (with argument parsing left off)
    from comfy.cli_args import args

    args.cpu = True


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
        tensors[OFFICIAL_PREFIX + "scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    else:
        tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata=metadata)
