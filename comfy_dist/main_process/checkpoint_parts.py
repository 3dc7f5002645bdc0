"""What else is in a one-file checkpoint: the text encoder and the VAE, as ComfyUI's own loader gives them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import comfy.sd
import folder_paths


@dataclass(frozen=True)
class CheckpointParts:
    """Loaded from one state of one file."""

    source: tuple[str, int, int]
    clip: Any  # ComfyUI's CLIP; None where the file has none
    vae: Any  # ComfyUI's VAE, which raises when it is used if the file has none

    @classmethod
    def of(cls, path: str, kept: CheckpointParts | None) -> CheckpointParts:
        """Load them, unless they are the kept ones. The transformer's weights are not touched."""
        found = os.stat(path)
        source = os.path.realpath(path), found.st_mtime_ns, found.st_size
        if kept is not None and kept.source == source:
            return kept
        _, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            path, output_vae=True, output_clip=True, output_model=False,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )  # fmt: skip
        return cls(source, clip, vae)
