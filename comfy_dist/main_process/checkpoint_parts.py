"""What else is in a one-file checkpoint: the text encoder, as ComfyUI's own loader gives it, and the VAE, on the workers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NoReturn

import comfy.sd
import folder_paths

from rayltx.comfy_dist.comfy_types import VAE
from rayltx.comfy_dist.main_process.loaded_models import FileState
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.ray_values import let_go_of_vae, load_vae
from rayltx.diffusion_models.lightricks.checkpoint import OFFICIAL_PREFIX
from rayltx.diffusion_models.lightricks.vae_checkpoint import VIDEO, holds_vae
from rayltx.errors import AbsentPartError, InputError
from rayltx.expansion.comfyui_gguf.checkpoint import GGUFCheckpoint, open_model_file


def is_bundle(path: str) -> bool:
    """Whether ComfyUI's loader of checkpoints finds the transformer in a file. Raises CheckpointError for no LTX file."""
    checkpoint = open_model_file(path)
    return checkpoint.prefix == OFFICIAL_PREFIX and not isinstance(checkpoint, GGUFCheckpoint)


def check_is_bundle(path: str) -> None:
    """Raises InputError for a file whose transformer ComfyUI's loader of checkpoints would not find."""
    prefix = open_model_file(path).prefix
    if prefix != OFFICIAL_PREFIX:
        raise InputError(
            f"{path}: its tensors are named {prefix or 'without a prefix'!r}, and those of a checkpoint in one file "
            f"{OFFICIAL_PREFIX!r}: it holds the model alone; load it with Load Diffusion Model (Ray), and the VAE with Load VAE"
        )


@dataclass(frozen=True)
class CheckpointParts:
    """Loaded from one state of one file."""

    source: FileState
    clip: Any  # ComfyUI's CLIP; None where the file has none

    @classmethod
    def of(cls, path: str) -> CheckpointParts:
        """Load them. The weights of the transformer and the VAE are not touched."""
        _, clip, _, _ = comfy.sd.load_checkpoint_guess_config(
            path, output_vae=False, output_clip=True, output_model=False,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )  # fmt: skip
        return cls(FileState.of(path), clip)


def vae_of(path: str, placement: Placement, node: object, remedy: str) -> VAE:
    """The VAE of a checkpoint, on the workers; one that raises when it is used where the file has none.

    node: keeps it. remedy: what to do then, for the message.
    """
    if holds_vae(path):
        return load_vae(path, VIDEO, placement.request, node)
    let_go_of_vae(node)
    return AbsentVAE(f"{os.path.basename(path)} holds no VAE: {remedy}")


class AbsentVAE:
    """In the place of the VAE of a file that has none. Whatever is done with it raises AbsentPartError.

    ComfyUI's own for this raises in `encode` and `decode` alone, and nodes for LTX ask for its factors before.
    """

    _message = ""  # for what looks at an object that is being copied

    def __init__(self, message: str) -> None:
        self._message = message

    def __getattr__(self, name: str) -> NoReturn:
        raise AbsentPartError(self._message)
