"""Configurations of tiny models of every LTX version, as an official file's `config` has them.

Their sizes are chosen to be awkward: head counts and widths that few rank counts divide. This module imports nothing.
"""

from __future__ import annotations

from typing import Any

_VIDEO = {
    "in_channels": 128, "num_attention_heads": 4, "attention_head_dim": 24, "cross_attention_dim": 4 * 24,
    "caption_channels": 48, "num_layers": 2, "causal_temporal_positioning": True,
    "positional_embedding_max_pos": [20, 2048, 2048],
}  # fmt: skip
_AUDIO_VIDEO = {
    **_VIDEO, "audio_num_attention_heads": 4, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 4 * 16,
    "use_middle_indices_grid": True, "rope_type": "split", "frequencies_precision": "float64",
    "av_ca_timestep_scale_multiplier": 1000.0,
}  # fmt: skip
_LTX_2_3 = {
    **_AUDIO_VIDEO, "apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True,
}  # fmt: skip
_SHARED: dict[str, dict[str, Any]] = {
    "LTX-Video": _VIDEO,
    "LTX-2": _AUDIO_VIDEO,
    "LTX-2.3": _LTX_2_3,
    "LTX-2.5": {**_LTX_2_3, "ff_bias": False, "use_keyframes_abs_pos_embedding": True},
}

# Of the transformer alone, as diffusers has it.
TRANSFORMER_CONFIGS: dict[str, dict[str, Any]] = {
    version: {**shared, "out_channels": 128, "timestep_scale_multiplier": 1000} for version, shared in _SHARED.items()
}

# ComfyUI's classes have the text connector of LTX-2 and later as well.
_CONNECTOR = {
    "audio_in_channels": 128, "connector_attention_head_dim": 12, "connector_num_attention_heads": 4,
    "connector_num_layers": 1,
}  # fmt: skip
_GATED_CONNECTOR = {
    **_CONNECTOR, "connector_apply_gated_attention": True, "connector_attention_head_dim": 24,
    "audio_connector_attention_head_dim": 16, "audio_connector_num_attention_heads": 4,
}  # fmt: skip
_CONNECTORS = {"LTX-Video": {}, "LTX-2": _CONNECTOR, "LTX-2.3": _GATED_CONNECTOR, "LTX-2.5": _GATED_CONNECTOR}
COMFYUI_CONFIGS: dict[str, dict[str, Any]] = {
    version: {
        **shared,
        **_CONNECTORS[version],
        "vae_scale_factors": [8, 32, 32],
        "timestep_scale_multiplier": 1000.0,
    }
    for version, shared in _SHARED.items()
}
