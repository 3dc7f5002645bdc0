"""Tiny seeded checkpoints of every LTX version, in the official format, for checks and tests.

Their sizes are chosen to be awkward: head counts and widths that few rank counts divide.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from rayltx.diffusion_models.lightricks.random_weights import randomise

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

HEADS, HEAD_DIM, AUDIO_HEAD_DIM, CAPTION = 4, 24, 16, 48
_VIDEO = {
    "in_channels": 128, "out_channels": 128, "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM,
    "cross_attention_dim": HEADS * HEAD_DIM, "caption_channels": CAPTION, "num_layers": 2,
    "timestep_scale_multiplier": 1000, "causal_temporal_positioning": True,
    "positional_embedding_max_pos": [20, 2048, 2048],
}  # fmt: skip
_AUDIO_VIDEO = {
    **_VIDEO, "audio_num_attention_heads": HEADS, "audio_attention_head_dim": AUDIO_HEAD_DIM,
    "audio_cross_attention_dim": HEADS * AUDIO_HEAD_DIM, "use_middle_indices_grid": True, "rope_type": "split",
    "frequencies_precision": "float64", "av_ca_timestep_scale_multiplier": 1000.0,
}  # fmt: skip
_LTX_2_3 = {
    **_AUDIO_VIDEO, "apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True,
}  # fmt: skip

TRANSFORMER_CONFIGS: dict[str, dict[str, Any]] = {
    "LTX-Video": _VIDEO,
    "LTX-2": _AUDIO_VIDEO,
    "LTX-2.3": _LTX_2_3,
    "LTX-2.5": {**_LTX_2_3, "ff_bias": False, "use_keyframes_abs_pos_embedding": True},
}


def build_reference(version: str, layers: int = 2) -> LTXVideoTransformer3DModel | LTX2VideoTransformer3DModel:
    """diffusers' own model, untouched, with memory but without meaningful weights."""
    config = TRANSFORMER_CONFIGS[version]
    if version == "LTX-Video":
        return LTXVideoTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, cross_attention_dim=HEADS * HEAD_DIM,
            caption_channels=CAPTION, num_layers=layers,
        ).eval()  # fmt: skip
    newer = "cross_attention_adaln" in config
    return LTX2VideoTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, cross_attention_dim=HEADS * HEAD_DIM,
        audio_num_attention_heads=HEADS, audio_attention_head_dim=AUDIO_HEAD_DIM,
        audio_cross_attention_dim=HEADS * AUDIO_HEAD_DIM, caption_channels=CAPTION, num_layers=layers, rope_type="split",
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


def official_tensors(model: torch.nn.Module, prefix: str = "model.diffusion_model.") -> dict[str, Tensor]:
    return {prefix + official_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}


def save_tiny_checkpoint(
    path: Path,
    version: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    prefix: str = "model.diffusion_model.",
) -> LTXVideoTransformer3DModel | LTX2VideoTransformer3DModel:
    """Write a tiny checkpoint; returns the model whose weights it holds."""
    model = build_reference(version, layers)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    randomise(model, seed)
    config = {"transformer": {**TRANSFORMER_CONFIGS[version], "num_layers": layers}}
    save_file(official_tensors(model, prefix), path, metadata={"config": json.dumps(config)})
    return model
