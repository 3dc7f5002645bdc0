"""The demo's video VAE: LTX-Video's own architecture, small, and the names that its official files have.

LTX's latents hold 128 numbers for every block of 8 pixel frames x 32 x 32 pixels, and for the first pixel frame alone.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.vae_checkpoint import holds_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTXVideo

logger = logging.getLogger(__name__)

CHECKPOINT = Path(__file__).with_name("shapes.safetensors")
MODEL_VERSION = "rayltx-demo-2"  # in its metadata
KNOWN_LATENTS = (6, 8, 8)  # frames, height and width of the largest clips that it was trained on
ENCODER_WIDTH, DECODER_WIDTH = 12, 14  # channels at a quarter of the picture's rows and columns; doubled by each stage
_STAGES = 3  # each halves frames, rows and columns
_RESIDUAL = (True, True, False)  # whether a stage's upsampling passes its input on, of 8k channels; latents first
OFFICIAL_PREFIX = "vae."

# Where the blocks of the official files are in diffusers' class.
_ENCODER_BLOCKS = (
    "down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.1", "down_blocks.1.downsamplers.0", "down_blocks.2",
    "down_blocks.2.downsamplers.0", "mid_block",
)  # fmt: skip
_DECODER_BLOCKS = (
    "mid_block", "up_blocks.0.upsamplers.0", "up_blocks.0", "up_blocks.1.upsamplers.0", "up_blocks.1",
    "up_blocks.2.upsamplers.0", "up_blocks.2",
)  # fmt: skip


_BLOCKS = {"encoder": (_ENCODER_BLOCKS, "down_blocks"), "decoder": (_DECODER_BLOCKS, "up_blocks")}
_STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}


def official_config() -> dict[str, Any]:
    """The `vae` part of the file's `config` metadata: blocks from the pixels to the latents, on both sides."""
    layer = ["res_x", {"num_layers": 1}]
    down = ["compress_all_res", {"multiplier": 2}]
    ups = [["compress_all", {"residual": residual, "multiplier": 2}] for residual in reversed(_RESIDUAL)]
    return {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 128,
        "encoder_base_channels": ENCODER_WIDTH,
        "decoder_base_channels": DECODER_WIDTH,
        "encoder_blocks": [*[layer, down] * _STAGES, layer],
        "decoder_blocks": [*(block for up in ups for block in (layer, up)), layer],
        "scaling_factor": 1.0,
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": False,
        "spatial_padding_mode": "zeros",
    }


def is_demo(checkpoint: Checkpoint) -> bool:
    return checkpoint.metadata.get("model_version") == MODEL_VERSION


def check_options(shape: LatentShape) -> None:
    """Warn of a clip that is larger than those that the demo's model was trained on."""
    if any(size > known for size, known in zip((shape.frames, shape.height, shape.width), KNOWN_LATENTS)):
        logger.warning(
            "the demo's model was trained on clips of up to 41 frames of 256x256 pixels: what it makes of larger ones falls apart"
        )


def decode(latent: Tensor, checkpoint: Path = CHECKPOINT) -> Tensor:
    """Decode a latent (1, C, f, h, w) of the demo's model, with the VAE of its checkpoint; of one without, by ours.

    Returns the clip (8 (f-1) + 1, 32 h, 32 w, 3) float32 in [0, 1].
    """
    with torch.inference_mode():
        source = checkpoint if holds_vae(checkpoint) else CHECKPOINT
        pixels = load_vae(source).eval().decode(latent.float(), return_dict=False)[0][0]
    return ((pixels.permute(1, 2, 3, 0) + 1.0) / 2.0).clamp(0.0, 1.0)


def load_vae(checkpoint: Path) -> AutoencoderKLLTXVideo:
    """The VAE of a file that the demo's training wrote, in float32."""
    vae = build_vae()
    names = {official: name for name, official in _official_names(vae).items()}
    with safe_open(checkpoint, "pt") as file:
        held = [name for name in file.keys() if name.startswith(OFFICIAL_PREFIX)]  # noqa: SIM118  (no mapping)
        vae.load_state_dict({names[name]: file.get_tensor(name).float() for name in held})
    return vae


def build_vae() -> AutoencoderKLLTXVideo:
    """diffusers' class, as `official_config` has it. On torch's default device."""
    from diffusers import AutoencoderKLLTXVideo  # not above: it takes seconds, and others use this module

    return AutoencoderKLLTXVideo(
        latent_channels=128,
        block_out_channels=tuple(ENCODER_WIDTH * 2**stage for stage in range(_STAGES + 1)),
        down_block_types=("LTXVideo095DownBlock3D",) * _STAGES,
        decoder_block_out_channels=tuple(DECODER_WIDTH * 2**stage for stage in range(1, _STAGES + 1)),
        layers_per_block=(1,) * (_STAGES + 1),
        decoder_layers_per_block=(1,) * (_STAGES + 1),
        spatio_temporal_scaling=(True,) * _STAGES,
        decoder_spatio_temporal_scaling=(True,) * _STAGES,
        decoder_inject_noise=(False,) * (_STAGES + 1),
        downsample_type=("spatiotemporal",) * _STAGES,
        upsample_residual=tuple(reversed(_RESIDUAL)),
        upsample_factor=(2,) * _STAGES,
    )


def official_tensors(vae: AutoencoderKLLTXVideo) -> dict[str, Tensor]:
    """The weights under the names that LTX-Video's files have."""
    names = _official_names(vae)
    return {names[name]: tensor for name, tensor in vae.state_dict().items()}


def _official_names(vae: AutoencoderKLLTXVideo) -> dict[str, str]:
    """What each of the weights is called in LTX-Video's files."""
    names = {}
    for whole in vae.state_dict():
        name = _STATISTICS.get(whole, whole)
        side, _, rest = name.partition(".")
        blocks, theirs = _BLOCKS.get(side, ((), ""))
        place = max((block for block in blocks if rest.startswith(f"{block}.")), key=len, default=None)
        if place is not None:
            rest = f"{theirs}.{blocks.index(place)}.{rest.removeprefix(f'{place}.')}"
            rest = rest.replace("resnets.", "res_blocks.").replace("conv_shortcut.conv.", "conv_shortcut.")
            rest = re.sub(r"\bnorm3\.", "norm3.norm.", rest)
            name = f"{side}.{rest}"
        names[whole] = OFFICIAL_PREFIX + name
    return names
