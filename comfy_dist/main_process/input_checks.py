"""Latents and text of another model, told before the workers stumble over them."""

from __future__ import annotations

from torch import Tensor

from rayltx.comfy_dist.comfy_types import DiffusionModel
from rayltx.comfy_dist.model_spec import text_width
from rayltx.errors import InputError


def check_inputs(model: DiffusionModel, version: str, x: Tensor | list[Tensor], context: Tensor | None) -> None:
    """Raises InputError for a latent or a text that a forward of this model cannot take.

    version: of the model, for messages. x: the video's latent (B, C, F, H, W), or both streams'. context: (B, L, width).
    """
    video = x[0] if isinstance(x, (list, tuple)) else x
    if video.ndim == 3:  # ComfyUI packs several streams into one before a model that has one asks for them apart
        raise InputError(
            f"the latent holds video and audio, and this {version} model has no audio: give it the video latent alone "
            "(LTXVSeparateAVLatent), or load an LTX-2 checkpoint"
        )
    if video.ndim != 5 or video.shape[1] != model.in_channels:
        raise InputError(
            f"the latent has the shape {tuple(video.shape)}: a {version} model takes (batch, {model.in_channels}, frames, "
            "height, width); use an empty LTX latent, or the VAE of this model"
        )
    width = text_width(model)
    if context is not None and context.shape[-1] != width:
        raise InputError(
            f"the conditioning is {context.shape[-1]} wide, and this {version} model takes {width}; encode the text with "
            "the text encoder of this LTX version"
        )


def check_text_to_connect(model: DiffusionModel, version: str, context: Tensor) -> None:
    """Raises InputError for a text (B, L, width) that the model's text connector cannot take."""
    both = model.cross_attention_dim + model.audio_cross_attention_dim
    if context.shape[-1] not in (model.caption_channels, 2 * model.caption_channels, both):
        raise InputError(
            f"the conditioning is {context.shape[-1]} wide, which this {version} model's text connector does not take; encode "
            "the text with the text encoder of this LTX version"
        )


def estimated_shape(x: Tensor | list[Tensor]) -> list[int]:
    """The latent's shape as ComfyUI estimates memory by: an audio-video latent counts as one packed stream."""
    if isinstance(x, (list, tuple)):
        batch = x[0].shape[0]
        return [batch, 1, sum(stream.numel() for stream in x) // batch]
    return list(x.shape)
