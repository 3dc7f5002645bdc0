"""How a GGUF file's weights are held and computed with in ComfyUI's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rayltx.comfy_dist.dtype_choices import GGUF_DTYPES
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.errors import InputError
from rayltx.expansion.comfyui_gguf.checkpoint import BlockFormat, GGUFCheckpoint, quantised_formats


@dataclass(frozen=True)
class GGUFSpec:
    """What a worker needs to know besides the bytes. Picklable."""

    formats: Mapping[str, BlockFormat]  # of the quantised weights, by official name
    dequant_dtype: str = "default"  # in what blocks become values; target: what the layer computes in; default: float32
    patch_dtype: str = "default"  # in what patches of them are computed

    @classmethod
    def of(cls, checkpoint: Checkpoint, dequant_dtype: str, patch_dtype: str) -> GGUFSpec | None:
        """None for a file of another kind. Raises InputError for a dtype that is none of the choices."""
        if not isinstance(checkpoint, GGUFCheckpoint):
            return None
        for name, choice in (("dequant_dtype", dequant_dtype), ("patch_dtype", patch_dtype)):
            if choice not in GGUF_DTYPES:
                raise InputError(f"{name}={choice!r} must be one of {', '.join(GGUF_DTYPES)}")
        return cls(quantised_formats(checkpoint), dequant_dtype, patch_dtype)

    def compute_dtype(self, target: torch.dtype) -> torch.dtype:
        return chosen_dtype(self.dequant_dtype, target)


def chosen_dtype(choice: str, target: torch.dtype) -> torch.dtype:
    """The dtype that a choice of `dequant_dtype` or `patch_dtype` means for a layer that computes in `target`."""
    if choice == "target":
        return target
    return torch.float32 if choice == "default" else getattr(torch, choice)


def keeps_blocks(owner: nn.Module, name: str) -> bool:
    """Whether a module uses its weight as blocks: linear layers do, nothing else does."""
    return isinstance(owner, nn.Linear) and name.endswith(".weight")
