"""An LTX transformer out of a GGUF file, as a state dict: and every other kind of file refused by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rayltx.diffusion_models.lightricks.checkpoint import PREFIXES, find_prefix, missing_marks
from rayltx.errors import CheckpointError
from rayltx.expansion.comfyui_gguf.dequantisation import QuantisedTensor
from rayltx.expansion.comfyui_gguf.reading import GGUFFile, open_gguf

logger = logging.getLogger(__name__)

LTX_ARCHITECTURES = ("ltxv", "ltxav", "ltx2", "ltx")
_TEXT_ARCHITECTURES = (
    "t5", "t5encoder", "llama", "gemma", "gemma2", "gemma3", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "clip", "mistral3",
)  # fmt: skip
_OTHER_ARCHITECTURES = (
    "flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "hyvid", "wan", "lumina2", "qwen_image",
)  # fmt: skip


def gguf_sd_loader(
    path: str | os.PathLike[str], prefixes: Sequence[str] = PREFIXES
) -> tuple[dict[str, Tensor | QuantisedTensor], dict[str, Any]]:
    """The transformer's tensors by their official names without prefix, on a mapping of the file.

    Returns the state dict, and `{"arch_str": ..., "metadata": ...}`. Raises CheckpointError for a damaged file, a part
    of a split one, and one that holds no LTX transformer.
    """
    file, prefix = open_ltx_gguf(path, prefixes)
    others = [name for name in file.tensors if not name.startswith(prefix)]
    if others:
        logger.warning(
            "%s: %d tensors without the prefix %s (%s, ...) are left out", file.path, len(others), prefix, others[0]
        )
    with file.open() as reader:
        state_dict = {name.removeprefix(prefix): reader.read(name) for name in file.tensors if name.startswith(prefix)}
    return state_dict, {"arch_str": file.architecture, "metadata": file.metadata}


def open_ltx_gguf(path: str | os.PathLike[str], prefixes: Sequence[str] = PREFIXES) -> tuple[GGUFFile, str]:
    """The file, and the prefix of its transformer's names. Raises as `gguf_sd_loader`."""
    file = open_gguf(path)
    prefix = find_prefix(file.tensors, prefixes)
    _check_architecture(file, prefix)
    return file, prefix


def _check_architecture(file: GGUFFile, prefix: str) -> None:
    architecture, metadata = file.architecture, file.metadata
    if metadata.get("split.count", 1) != 1:
        number = metadata.get("split.no", 0)
        part = number + 1 if isinstance(number, int) else repr(number)
        raise CheckpointError(
            f"{file.path}: part {part} of {metadata['split.count']} of a model; join them with "
            "llama.cpp's `llama-gguf-split --merge`"
        )
    if architecture in LTX_ARCHITECTURES:
        return
    if architecture in _TEXT_ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: a text encoder (architecture {architecture}), not an LTX transformer; load it with "
            "`CLIPLoader (GGUF)` or `DualCLIPLoader (GGUF)` of ComfyUI-GGUF"
        )
    if architecture in _OTHER_ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: a model of the architecture {architecture}, not LTX; load it with `Unet Loader (GGUF)` of "
            "ComfyUI-GGUF, on one GPU"
        )
    missing = missing_marks(file.tensors, prefix)
    if missing:
        shown = "no architecture" if architecture is None else f"the architecture {architecture}"
        raise CheckpointError(
            f"{file.path}: it names {shown}, and has no {missing[0]} among its {len(file.tensors)} tensors, so it is not "
            "an LTX transformer; for another model, use `Unet Loader (GGUF)` of ComfyUI-GGUF"
        )
