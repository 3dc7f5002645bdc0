"""Tiny seeded checkpoints of every LTX version, in the official format, for checks and tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from rayltx.diffusion_models.lightricks.checkpoint import OFFICIAL_PREFIX
from rayltx.diffusion_models.lightricks.random_weights import randomise
from rayltx.diffusion_models.lightricks.tiny_configs import TRANSFORMER_CONFIGS

# diffusers' parameter names to the official ones; the way back is diffusers' own conversion.
_OFFICIAL = {
    "audio_prompt_adaln.": "audio_prompt_adaln_single.",
    "prompt_adaln.": "prompt_adaln_single.",
    "audio_proj_in.": "audio_patchify_proj.",
    "proj_in.": "patchify_proj.",
    "audio_time_embed.": "audio_adaln_single.",
    "time_embed.": "adaln_single.",
    "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
    "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
    "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
    "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "norm_q.": "q_norm.",
    "norm_k.": "k_norm.",
}
_SIZES = ("num_attention_heads", "attention_head_dim", "cross_attention_dim", "caption_channels")
_AUDIO_SIZES = ("audio_num_attention_heads", "audio_attention_head_dim", "audio_cross_attention_dim")


def build_reference(
    version: str, layers: int = 2, config: Mapping[str, Any] | None = None
) -> LTXVideoTransformer3DModel | LTX2VideoTransformer3DModel:
    """diffusers' own model, untouched, with memory but without meaningful weights. config: None stands for the tiny one."""
    config = TRANSFORMER_CONFIGS[version] if config is None else config
    sizes = {key: config[key] for key in _SIZES}
    if version == "LTX-Video":
        return LTXVideoTransformer3DModel(**sizes, num_layers=layers).eval()
    newer = "cross_attention_adaln" in config
    return LTX2VideoTransformer3DModel(
        **sizes, **{key: config[key] for key in _AUDIO_SIZES}, num_layers=layers, rope_type="split",
        gated_attn=newer, audio_gated_attn=newer, cross_attn_mod=newer, audio_cross_attn_mod=newer,
        use_prompt_embeddings=not newer, perturbed_attn=True, ff_bias=config.get("ff_bias", True),
        use_keyframes_abs_pos_embedding=config.get("use_keyframes_abs_pos_embedding", False),
    ).eval()  # fmt: skip


def official_name(name: str) -> str:
    """The official name of one of diffusers' parameters, without prefix."""
    for theirs, official in _OFFICIAL.items():
        before, found, after = name.partition(theirs)
        if found and (not before or before.endswith(".")):  # whole parts of the name only
            return before + official + after
    return name


def official_tensors(model: torch.nn.Module, prefix: str = OFFICIAL_PREFIX) -> dict[str, Tensor]:
    return {prefix + official_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}


def save_tiny_checkpoint(
    path: Path,
    version: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    prefix: str = OFFICIAL_PREFIX,
) -> LTXVideoTransformer3DModel | LTX2VideoTransformer3DModel:
    """Write a tiny checkpoint; returns the model whose weights it holds."""
    model = build_reference(version, layers)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    randomise(model, seed)
    config = {"transformer": {**TRANSFORMER_CONFIGS[version], "num_layers": layers}}
    save_file(official_tensors(model, prefix), path, metadata={"config": json.dumps(config)})
    return model
