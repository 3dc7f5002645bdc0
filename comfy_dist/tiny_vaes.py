"""Tiny random video VAEs of every kind that LTX has, made with the installed ComfyUI's own classes: for checks and tests."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from rayltx.diffusion_models.lightricks.random_weights import randomise

# A VAE of LTX's kind, with few channels: 8 x 32 x 32 pixels a latent, as all of them.
_RES: list[Any] = ["res_x", {"num_layers": 1, "inject_noise": False}]
_NOISY_RES: list[Any] = ["res_x", {"num_layers": 1, "inject_noise": True}]
_UP: list[Any] = ["compress_all", {"residual": True, "multiplier": 2}]
VAE_CONFIG: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128,
    "encoder_base_channels": 8, "decoder_base_channels": 8, "patch_size": 4, "norm_layer": "pixel_norm",
    "encoder_blocks": [*[["compress_all", {}]] * 3, _RES], "decoder_blocks": [_RES, _UP, _UP, _UP, _RES],
    "scaling_factor": 1.0, "latent_log_var": "uniform", "use_quant_conv": False, "causal_decoder": False,
    "timestep_conditioning": False,
}  # fmt: skip

# The decoder of LTX-2.5: neighbourhood attention in five stages, the last of which takes noise off.
_DIFFUSION_CONFIG: dict[str, Any] = {
    "_class_name": "CausalDiffusionVAE", "dims": 3, "model_output_type": "x0",
    "encoder": {
        "in_channels": 3, "out_channels": 128, "blocks": [*[["compress_all", {}]] * 3, _RES], "patch_size": 4,
        "latent_log_var": "constant", "norm_layer": "pixel_norm", "base_channels": 8,
    },
    "decoder": {
        "head_dim": 8, "stage_channels": [64, 32, 16, 16, 8], "stage_depths": [1, 1, 1, 1, 1], "t_emb_dim": 8,
        "stage_kernels": [[3, 7, 7], [3, 7, 7], [3, 5, 5], [3, 5, 5], [11, 11, 11]], "stage5_kernel": [11, 11, 11],
        "upsamples": [[[1, 2, 2], 2], [[2, 1, 1], 2], [[2, 2, 2], 1], [[2, 2, 2], 2]],
    },
}  # fmt: skip
_NOISY_CONFIG: dict[str, Any] = {  # as of LTX-Video 0.9.1 to 0.9.8, which draw noise while they decode
    **VAE_CONFIG, "timestep_conditioning": True, "spatial_padding_mode": "reflect",
    "decoder_blocks": [_NOISY_RES, _UP, _UP, _UP, _NOISY_RES],
}  # fmt: skip
VIDEO_VAES = {"convolutions": VAE_CONFIG, "convolutions with noise": _NOISY_CONFIG, "diffusion": _DIFFUSION_CONFIG}

# Not among the names that RayLTX needs (`comfy_names`): older versions lack one, and samplers do without both.
_CLASSES = {
    "convolutions": ("comfy.ldm.lightricks.vae.causal_video_autoencoder", "VideoVAE"),
    "diffusion": ("comfy.ldm.lightricks.vae.na_diffusion_decoder", "CausalDiffusionVAE"),
}


def video_vae_model(kind: str, decoder: Mapping[str, Any] = {}) -> Any:
    """The model of a VAE of VIDEO_VAES, with seeded weights. decoder: in the place of what its configuration says of that."""
    module, name = _CLASSES["diffusion" if kind == "diffusion" else "convolutions"]
    config = VIDEO_VAES[kind]
    if decoder:
        config = {**config, "decoder": {**config["decoder"], **decoder}}
    model = getattr(importlib.import_module(module), name)(config=config)
    randomise(model, 0)
    with torch.no_grad():
        last = model.decoder.conv_out if kind == "diffusion" else model.decoder.conv_out.conv
        last.weight.mul_(0.02)  # most pixels are within their bounds then, where differences show
        for layer in model.decoder.modules():
            if getattr(layer, "inject_noise", False):  # so that it is not drowned
                layer.per_channel_scale1.mul_(20)
                layer.per_channel_scale2.mul_(20)
    generator = torch.Generator().manual_seed(1)
    statistics = model.per_channel_statistics
    statistics.register_buffer("std-of-means", 0.5 + torch.rand(128, generator=generator))
    statistics.register_buffer("mean-of-means", torch.randn(128, generator=generator))
    return model.eval()
