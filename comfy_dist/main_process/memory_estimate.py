"""What a rank needs of its device's memory besides its share of what ComfyUI estimates for the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rayltx.comfy_dist.comfy_types import DiffusionModel
from rayltx.comfy_dist.model_spec import has_audio
from rayltx.diffusion_models.lightricks.step_cost import TEXT_TOKENS
from rayltx.sequence_parallel.exchange_memory import exchange_bytes
from rayltx.sequence_parallel.partition import ParallelConfig

# Tensors as wide as a stream that live at once while a block works on a token of it.
_AUDIO_TENSORS = 16  # as ComfyUI's own estimate has for video: activations, modulations, and the feed-forward's 4
_TEXT_TENSORS = 4  # the text, its norm, keys and values


@dataclass(frozen=True)
class Replicated:
    """Tokens that every rank holds whole. As ComfyUI's text encoders pad, and 10 s of audio, until they are known."""

    text_tokens: int = TEXT_TOKENS
    audio_tokens: int = 256

    @classmethod
    def of(cls, x: Tensor | list[Tensor], context: object) -> Replicated:
        """Of a call of the model: x as its forward takes it, context (B, L, width)."""
        audio = x[1].shape[2] if isinstance(x, (list, tuple)) and len(x) > 1 else 0
        return cls(context.shape[1] if isinstance(context, Tensor) else 0, audio)


def bytes_of_sharing(
    model: DiffusionModel,
    latent_shape: Sequence[int],
    config: ParallelConfig,
    element_bytes: int,
    replicated: Replicated,
) -> int:
    """latent_shape: (B, C, F, H, W), or (B, 1, elements) of packed streams, as ComfyUI estimates by. 0 for one rank."""
    if config.world_size == 1:
        return 0
    batch, tokens = latent_shape[0], math.prod(latent_shape[1:]) // model.in_channels
    audio_width = model.audio_inner_dim if has_audio(model) else 0
    whole = replicated.text_tokens * _TEXT_TENSORS * (model.inner_dim + audio_width)
    whole += replicated.audio_tokens * _AUDIO_TENSORS * audio_width
    # ComfyUI's estimate has them once; a share of it, a share of them.
    missing = whole * batch * element_bytes * (config.world_size - 1) // config.world_size
    # Rows with masks of their own are shared by all ranks, whose buffers are the larger ones.
    heads = model.num_attention_heads
    whole_group = config.of_group(1)
    return exchange_bytes(whole_group, tokens, batch, heads, model.inner_dim // heads, element_bytes) + missing
