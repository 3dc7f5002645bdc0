"""The VAEs of LTX in files: of video and of sound, by themselves or next to the transformer."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError

from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint, Header, among_tensors
from rayltx.diffusion_models.lightricks.safetensors_files import open_safetensors
from rayltx.errors import CheckpointError, InputError
from rayltx.whole_files import check_is_file

VIDEO, AUDIO, ANY = "video", "audio", "auto"
PARTS = (ANY, VIDEO, AUDIO)
_BUNDLED = "vae."  # under which a one-file checkpoint keeps the video's
_AUDIO_PREFIXES = ("audio_vae.", "autoencoder.", "vocoder.")
_VIDEO_MARKS = ("decoder.", "encoder.", "per_channel_statistics.")


def open_vae(path: str | os.PathLike[str], part: str = ANY) -> Checkpoint:
    """Find a VAE in a file, reading its header alone. part: one of PARTS; ANY is the video's, where there is one.

    Its tensors are by ComfyUI's names. Raises CheckpointError where there is none, or the file is missing or damaged.
    """
    if part not in PARTS:
        raise InputError(f"part={part!r} must be one of {', '.join(PARTS)}")
    path = Path(path)
    check_is_file(path)
    header = Header.of(path)
    prefix, names = _names(header.tensors, part)
    if not names:
        kind = {ANY: "VAE", VIDEO: "VAE of video", AUDIO: "VAE of sound"}[part]
        raise CheckpointError(f"{path}: there is no {kind} of LTX {among_tensors(header.tensors)}")
    return header.checkpoint(prefix, names)


def holds_vae(path: str | os.PathLike[str], part: str = VIDEO) -> bool:
    """Whether there is one in a file. False also for what is no safetensors file."""
    try:
        with open_safetensors(path) as file:
            return bool(_names(file.described(), part)[1])
    except (SafetensorError, OSError):
        return False


def _names(found: Collection[str], part: str) -> tuple[str, list[str]]:
    """The prefix of a VAE's tensors in a file, and their names there."""
    prefix, names = _video_names(found) if part in (ANY, VIDEO) else ("", [])
    if not names and part in (ANY, AUDIO):
        return "", [name for name in found if name.startswith(_AUDIO_PREFIXES)]
    return prefix, names


def _video_names(found: Collection[str]) -> tuple[str, list[str]]:
    for prefix in (_BUNDLED, ""):
        names = [name for name in found if name.startswith(tuple(prefix + mark for mark in _VIDEO_MARKS))]
        if any(name.startswith(prefix + _VIDEO_MARKS[0]) for name in names):
            return prefix, names
    return "", []
