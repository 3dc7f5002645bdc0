"""Models of the real widths, with as few layers as are needed to count one."""

from __future__ import annotations

from typing import Any

from rayltx.diffusion_models.lightricks.tiny_configs import COMFYUI_CONFIGS, TRANSFORMER_CONFIGS

_HEADS, _CAPTION_WIDTH = 32, 3840
_VIDEO_HEAD, _OLD_VIDEO_HEAD, _AUDIO_HEAD = 128, 64, 64  # widths; LTX-Video's is that of its 2B model
_CONNECTOR_HEADS = {"LTX-2": 30}


def _sizes(version: str) -> dict[str, Any]:
    """What the real model has in place of the tiny one's."""
    head = _OLD_VIDEO_HEAD if version == "LTX-Video" else _VIDEO_HEAD
    found: dict[str, Any] = {
        "num_attention_heads": _HEADS,
        "attention_head_dim": head,
        "cross_attention_dim": _HEADS * head,
        "caption_channels": 4096 if version == "LTX-Video" else _CAPTION_WIDTH,
    }
    if version != "LTX-Video":
        found.update(
            audio_num_attention_heads=_HEADS,
            audio_attention_head_dim=_AUDIO_HEAD,
            audio_cross_attention_dim=_HEADS * _AUDIO_HEAD,
        )
    return found


def transformer_config(version: str, layers: int) -> dict[str, Any]:
    """As an official file's `config` has it."""
    return {**TRANSFORMER_CONFIGS[version], **_sizes(version), "num_layers": layers}


def comfyui_config(version: str, layers: int) -> dict[str, Any]:
    """Of ComfyUI's class, whose connector has one layer."""
    config = {**COMFYUI_CONFIGS[version], **_sizes(version), "num_layers": layers}
    if version != "LTX-Video":
        config.update(
            connector_attention_head_dim=_VIDEO_HEAD,
            connector_num_attention_heads=_CONNECTOR_HEADS.get(version, _HEADS),
        )
        if version != "LTX-2":
            config.update(audio_connector_attention_head_dim=_AUDIO_HEAD, audio_connector_num_attention_heads=_HEADS)
    return config
