"""ComfyUI's LTX models in small, for the tests."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import torch
from slow_cases import slow

from rayltx.comfy_dist.tiny_checkpoints import model_class, save_tiny_checkpoint
from rayltx.comfy_dist.tiny_vaes import VAE_CONFIG, VIDEO_VAES, video_vae_model  # noqa: F401
from rayltx.diffusion_models.lightricks.checkpoint import OFFICIAL_PREFIX
from rayltx.diffusion_models.lightricks.random_weights import randomise
from rayltx.diffusion_models.lightricks.tiny_configs import COMFYUI_CONFIGS as CONFIGS

# The one that has most of what the others have each time; those with `-m slow`.
VERSIONS = ["LTX-2.3", *slow("LTX-Video", "LTX-2", "LTX-2.5")]


def save_tiny_bundle(path: Path, version: str) -> None:
    """A checkpoint in one file, as Load Checkpoint takes it: the transformer, and the VAE of that version next to it."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    save_tiny_checkpoint(path, version)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    kind = "diffusion" if version == "LTX-2.5" else "convolutions"
    vae = video_vae_model(kind).state_dict()
    tensors = {**load_file(path), **{f"vae.{name}": tensor.contiguous().clone() for name, tensor in vae.items()}}
    save_file(tensors, path, metadata={"config": json.dumps({**config, "vae": VIDEO_VAES[kind]})})


_MEL = {
    "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 64, "in_channels": 2, "out_ch": 2, "ch": 8,
    "ch_mult": [1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "mid_block_add_attention": False,
    "norm_type": "pixel", "causality_axis": "height",
}  # fmt: skip
_SOUND_CONFIG = {
    "audio_vae": {
        "model": {"params": {"ddconfig": _MEL, "sampling_rate": 16000}},
        "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160}},
    },
    "vocoder": {"upsample_initial_channel": 32, "stereo": True},
}


def save_tiny_vae(path: Path, kind: str) -> None:
    """A VAE of VIDEO_VAES in a file of its own, or with "sound" that of an audio-video model."""
    from safetensors.torch import save_file

    if kind == "sound":
        from comfy.ldm.lightricks.vae.audio_vae import AudioVAE

        model: torch.nn.Module = AudioVAE(metadata={"config": json.dumps(_SOUND_CONFIG)})
        randomise(model, 0)
        statistics = model.autoencoder.per_channel_statistics
        tensors = {
            **{name.replace("autoencoder.", "audio_vae.", 1): tensor for name, tensor in model.state_dict().items()},
            "audio_vae.per_channel_statistics.std-of-means": torch.ones(len(statistics.get_buffer("std-of-means"))),
            "audio_vae.per_channel_statistics.mean-of-means": torch.zeros(len(statistics.get_buffer("mean-of-means"))),
        }
        config: dict = _SOUND_CONFIG
    else:
        tensors, config = video_vae_model(kind).state_dict(), {"vae": VIDEO_VAES[kind]}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"config": json.dumps(config)})


def save_tiny_upscaler(path: Path, **settings: object) -> None:
    """A latent upscaler of LTX's kind, to twice the rows and columns. settings: of the class, for another.

    Raises TypeError where this ComfyUI has no such.
    """
    import comfy.ops
    from comfy.ldm.lightricks.latent_upsampler import LatentUpsampler
    from safetensors.torch import save_file

    config = {"in_channels": 128, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3, "spatial_upsample": True}
    config |= settings
    if unknown := {*settings} - {*inspect.signature(LatentUpsampler).parameters}:
        raise TypeError(f"no upsampler with {unknown}")
    given = inspect.signature(LatentUpsampler.from_config).parameters  # its layers, since ComfyUI 0.29
    operations = {"operations": comfy.ops.disable_weight_init} if "operations" in given else {}
    model = LatentUpsampler.from_config(config, **operations)
    randomise(model, 0)
    save_file(model.state_dict(), path, metadata={"config": json.dumps(config)})


def set_up_comfyui(path: str) -> None:
    """Make `comfy` importable, on the CPU, with default arguments."""
    if path not in sys.path:
        sys.path.insert(0, path)
    import comfy.options  # noqa: F401  (with argument parsing left off)
    from comfy.cli_args import args

    args.cpu = True


def tiny_model(path: str, version: str) -> torch.nn.Module:
    """A version's transformer as a self-test makes it, by ranks that have nothing of ComfyUI yet. path: ComfyUI's."""
    set_up_comfyui(path)
    from rayltx.comfy_dist import self_test

    return self_test.tiny_model(model_class(version), CONFIGS[version], torch.device("cpu"))


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
