"""The cases in which several ranks must give what one gives, and diffusers' untouched models to compare with.

Used by `rayltx check` and by the tests. Every count is chosen not to divide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape, video_positions
from rayltx.diffusion_models.lightricks.relative_error import relative_error

FRAME_RATE = 25.0
TEXT_TOKENS, AUDIO_TOKENS = 7, 9


@dataclass(frozen=True)
class Case:
    """One kind of forward: what is asked of the model besides the latent."""

    name: str
    shape: LatentShape = LatentShape(3, 5, 7)  # 105 tokens
    batch: int = 1
    text_mask: bool = False
    timestep: str = "single"  # or "frame" (image-to-video), "token" (inpainting)
    self_attention_mask: bool = False
    video_only: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    needs_audio_model: bool = False

    def inputs(self, model: DiffusersModel, seed: int = 0) -> dict[str, Any]:
        """As `ForwardInputs` has them, float32."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        video_width, audio_width = model.context_widths()
        frames, height, width = self.shape.frames, self.shape.height, self.shape.width
        inputs: dict[str, Any] = {
            "latent": randn(self.batch, model.channels, frames, height, width),
            "context": randn(self.batch, TEXT_TOKENS, video_width),
            "frame_rate": FRAME_RATE,
            "timestep": torch.rand(self.batch, generator=generator) * 0.8 + 0.2,
            **dict(self.options),
        }
        if self.timestep == "frame":
            timestep = inputs["timestep"][:, None].repeat(1, frames)
            timestep[:, 0] = 0.0
            inputs["timestep"] = timestep
        elif self.timestep == "token":
            inputs["timestep"] = inputs["timestep"][:, None] * torch.rand(
                self.batch, self.shape.num_tokens, generator=generator
            )
        if self.text_mask:
            mask = torch.ones(self.batch, TEXT_TOKENS, dtype=torch.int64)
            mask[0, 4:] = 0
            inputs["context_mask"] = mask
        if self.self_attention_mask:
            tokens = self.shape.num_tokens
            kept = (torch.rand(1, 1, tokens, tokens, generator=generator) > 0.3).float()
            inputs["self_attention_mask"] = (1.0 - kept) * -10000.0  # as diffusers makes it from a multiplicative one
        if model.has_audio and not self.video_only:
            inputs["audio_latent"] = randn(self.batch, 8, AUDIO_TOKENS, 16)
            inputs["audio_context"] = randn(self.batch, TEXT_TOKENS, audio_width)
            if self.text_mask:
                inputs["audio_context_mask"] = inputs["context_mask"]
            if self.timestep == "token":
                inputs["audio_timestep"] = torch.rand(self.batch, AUDIO_TOKENS, generator=generator)
        return inputs


CASES = (
    Case("text to video"),
    Case("text mask", text_mask=True),
    Case("image to video", timestep="frame"),
    Case("timestep a token", timestep="token", text_mask=True),
    Case("batch of 2", batch=2, text_mask=True, timestep="frame"),
    Case("batch of 4", batch=4, text_mask=True, timestep="token"),
    Case("fewer tokens than ranks", shape=LatentShape(1, 1, 3), timestep="token"),
    Case("chunked feed-forward", shape=LatentShape(3, 19, 23), options=(("feed_forward_chunks", 2),)),
    Case("self-attention mask", self_attention_mask=True, needs_audio_model=True),
    Case("video only", video_only=True, needs_audio_model=True),
    Case("guidance blocks", options=(("spatio_temporal_guidance_blocks", (1,)),), needs_audio_model=True),
)


def cases_for(model: DiffusersModel) -> list[Case]:
    return [case for case in CASES if model.has_audio or not case.needs_audio_model]


def untouched_forward(
    transformer: Callable[..., Any], model: DiffusersModel, inputs: dict[str, Any], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Run diffusers' own transformer in this process, whole, on the same inputs.

    transformer: an instance with the same weights. Returns what `DiffusersHost.forward` returns, float32 or wider.
    """
    latent = inputs["latent"].to(dtype)
    batch, _, frames, height, width = latent.shape
    shape = LatentShape(frames, height, width)
    timestep = inputs["timestep"] if inputs["timestep"].ndim > 1 else inputs["timestep"][:, None]
    if timestep.shape[1] == frames != shape.num_tokens:
        timestep = timestep.repeat_interleave(shape.tokens_per_frame, dim=1)
    sigma = timestep.amax(1)
    arguments: dict[str, Any] = {
        "hidden_states": latent.flatten(2).transpose(1, 2),
        "encoder_hidden_states": inputs["context"].to(dtype),
        "encoder_attention_mask": inputs.get("context_mask"),
        "timestep": timestep * model.timestep_scale,
        "return_dict": False,
    }
    with torch.inference_mode():
        if not model.has_audio:
            positions = video_positions(shape, FRAME_RATE, model.causal)[..., 0][None].expand(batch, -1, -1)
            video = transformer(**arguments, video_coords=positions)[0]
            return {"video": video.transpose(1, 2).unflatten(2, (frames, height, width))}
        audio_latent = inputs.get("audio_latent")
        audio_tokens = 0 if audio_latent is None else audio_latent.shape[2]
        video_only = audio_latent is None
        if audio_latent is None:
            # The untouched model always has an audio stream; with the modalities isolated its content is of no account.
            audio_latent, audio_tokens = torch.zeros(batch, 8, 1, 16), 1
        audio_context = inputs.get("audio_context")
        if audio_context is None:
            audio_context = torch.zeros(batch, 1, model.context_widths()[1])
        audio_timestep = inputs.get("audio_timestep", sigma)
        mask = inputs.get("self_attention_mask")
        keyframes = torch.zeros(batch, shape.num_tokens, 1)
        keyframes[:, : shape.tokens_per_frame] = 1.0
        video, audio = transformer(
            **arguments,
            audio_hidden_states=audio_latent.to(dtype).transpose(1, 2).flatten(2),
            audio_encoder_hidden_states=audio_context.to(dtype),
            audio_encoder_attention_mask=inputs.get("audio_context_mask"),
            audio_timestep=audio_timestep * model.timestep_scale,
            sigma=sigma * model.timestep_scale,
            audio_sigma=audio_timestep.reshape(batch, -1).amax(1) * model.timestep_scale,
            num_frames=frames,
            height=height,
            width=width,
            fps=FRAME_RATE,
            audio_num_frames=audio_tokens,
            use_cross_timestep=model.cross_timestep,
            isolate_modalities=video_only,
            spatio_temporal_guidance_blocks=list(inputs.get("spatio_temporal_guidance_blocks", ())),
            video_self_attention_mask=None if mask is None else 1.0 + mask[:, 0] / 10000.0,
            video_keyframes_mask=keyframes,
        )
    answer = {"video": video.transpose(1, 2).unflatten(2, (frames, height, width))}
    if not video_only:
        answer["audio"] = audio.unflatten(2, (8, 16)).transpose(1, 2)
    return answer


def worst_error(out: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    assert out.keys() == reference.keys(), (out.keys(), reference.keys())
    return max(relative_error(out[name], reference[name]) for name in reference)
