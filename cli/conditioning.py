"""Text conditioning for `rayltx generate`: from a file, or one of the demo's prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from rayltx.diffusion_models.lightricks.safetensors_files import damage_of
from rayltx.errors import CheckpointError, InputError
from rayltx.whole_files import check_is_file

FILE_KEYS = ("context", "context_mask", "audio_context", "audio_context_mask")
NEGATIVE = "negative_"


def load_conditioning(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Positive and negative conditioning of a safetensors file.

    It holds `context` (B, tokens, width), and may hold `context_mask`, `audio_context` and `audio_context_mask`; the
    same names behind `negative_` are the negative side. Returns None for a negative side that is not there.
    Raises CheckpointError for a file that cannot be read, InputError for one without `context`.
    """
    check_is_file(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {damage_of(error)}") from error
    unknown = sorted(name for name in tensors if name.removeprefix(NEGATIVE) not in FILE_KEYS)
    if unknown or "context" not in tensors:
        raise InputError(
            f"{path}: a conditioning file holds `context` and may hold {', '.join(FILE_KEYS[1:])}, each also with "
            f"`{NEGATIVE}` in front; this one holds {', '.join(sorted(tensors)) or 'nothing'}"
        )
    positive = {name: tensor for name, tensor in tensors.items() if not name.startswith(NEGATIVE)}
    negative = {name.removeprefix(NEGATIVE): tensor for name, tensor in tensors.items() if name.startswith(NEGATIVE)}
    return positive, negative or None
