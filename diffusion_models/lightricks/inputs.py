"""What a forward of the embedded host takes.

Letters in shapes: B batch, C video channels, F, H, W latent frames, rows, columns, N = F H W video tokens, L text
tokens, A audio tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from rayltx.errors import InputError, UnsupportedError
from rayltx.sequence_parallel.batch_rows import RowShare

AUDIO_CHANNELS, AUDIO_BINS = 8, 16  # of LTX's audio latents


@dataclass(frozen=True)
class ForwardInputs:
    """The inputs of one forward, whole: every rank gets all of them and takes its own tokens."""

    latent: Tensor  # (B, C, F, H, W)
    timestep: Tensor  # sigma in [0, 1]: (B,), (B, F) or (B, N)
    context: Tensor  # (B, L, width): text, as the transformer takes it (of LTX-2: behind its connector)
    context_mask: Tensor | None = None  # (B, L), 1 for tokens that count
    frame_rate: float = 25.0
    self_attention_mask: Tensor | None = None  # additive, (1|B, 1|heads, N, N), for video self-attention
    feed_forward_chunks: int = 1  # 0: automatic
    audio_latent: Tensor | None = None  # (B, 8, A, 16); None: the video alone
    audio_timestep: Tensor | None = None  # sigma: (B,) or (B, A); None: the largest of `timestep`
    audio_context: Tensor | None = None  # (B, L, width)
    audio_context_mask: Tensor | None = None  # (B, L)
    isolate_modalities: bool = False  # no attention between video and audio
    spatio_temporal_guidance_blocks: tuple[int, ...] = ()  # blocks whose self-attention passes its values through

    @classmethod
    def from_mapping(cls, inputs: Mapping[str, Any], has_audio: bool, channels: int) -> ForwardInputs:
        """Check what can be checked before anything is computed.

        Raises UnsupportedError for inputs that the embedded host does not know, or that this model has no use for;
        InputError for shapes that do not belong together.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(inputs) - known)
        if unknown:
            raise UnsupportedError(
                f"the embedded host does not know the input {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
            )
        if not has_audio:
            useless = [
                name
                for name in ("audio_latent", "audio_timestep", "audio_context", "audio_context_mask")
                if inputs.get(name) is not None
            ]
            useless += [name for name in ("isolate_modalities", "spatio_temporal_guidance_blocks") if inputs.get(name)]
            if useless:
                raise UnsupportedError(f"{', '.join(useless)}: an LTX-Video model has no such input; it is for LTX-2")
        self = cls(**inputs)
        self._check_shapes(has_audio, channels)
        return self

    def cut(self, share: RowShare) -> ForwardInputs:
        """The same of the local rows of the batch."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {name: share.cut(x) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def _check_shapes(self, has_audio: bool, channels: int) -> None:
        if self.latent.ndim != 5 or self.latent.shape[1] != channels:
            raise InputError(
                f"latent has the shape {tuple(self.latent.shape)}: it must be (batch, {channels}, frames, height, "
                "width) for this model"
            )
        batch = self.latent.shape[0]
        for name in (
            "timestep",
            "context",
            "context_mask",
            "audio_latent",
            "audio_timestep",
            "audio_context",
            "audio_context_mask",
        ):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[:1] != (batch,):
                raise InputError(f"{name} has the shape {tuple(tensor.shape)}, but the latent's batch is {batch}")
        for mask_name, context_name in (("context_mask", "context"), ("audio_context_mask", "audio_context")):
            mask, context = getattr(self, mask_name), getattr(self, context_name)
            if mask is None:
                continue
            if context is None or mask.shape != context.shape[:2]:
                shape = None if context is None else tuple(context.shape)
                raise InputError(f"{mask_name} has the shape {tuple(mask.shape)}, {context_name} {shape}")
            if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
                raise InputError(f"{mask_name} must hold 0 and 1, not weights: 1 marks the text tokens that count")
        num_tokens = self.latent.shape[2] * self.latent.shape[3] * self.latent.shape[4]
        if num_tokens == 0:
            raise InputError(f"latent has the shape {tuple(self.latent.shape)}: nothing to sample")
        mask = self.self_attention_mask
        if mask is not None and (mask.ndim != 4 or mask.shape[-2:] != (num_tokens, num_tokens)):
            raise InputError(
                f"self_attention_mask has the shape {tuple(mask.shape)}: it must be (batch or 1, heads or 1, "
                f"{num_tokens}, {num_tokens}) for this latent"
            )
        if has_audio and self.audio_latent is not None:
            shape = self.audio_latent.shape
            if len(shape) != 4 or (shape[1], shape[3]) != (AUDIO_CHANNELS, AUDIO_BINS):
                raise InputError(
                    f"audio_latent has the shape {tuple(shape)}: it must be (batch, {AUDIO_CHANNELS}, tokens, {AUDIO_BINS})"
                )
            if self.audio_context is None:
                raise InputError("audio_latent needs audio_context: the text as the audio stream takes it")
