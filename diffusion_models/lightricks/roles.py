"""The six kinds of attention in an LTX block. LTX-Video has the first two."""

from __future__ import annotations

from enum import Enum


class AttentionRole(Enum):
    """The value is the module's name in a block, the same in ComfyUI's and diffusers' models and in checkpoints."""

    VIDEO_SELF = "attn1"
    VIDEO_TEXT = "attn2"
    AUDIO_SELF = "audio_attn1"
    AUDIO_TEXT = "audio_attn2"
    AUDIO_TO_VIDEO = "audio_to_video_attn"  # queries are video tokens
    VIDEO_TO_AUDIO = "video_to_audio_attn"  # queries are audio tokens


TEXT_ROLES = (AttentionRole.VIDEO_TEXT, AttentionRole.AUDIO_TEXT)  # whose keys and values are the text's
