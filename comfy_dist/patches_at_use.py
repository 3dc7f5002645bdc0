"""Patches of quantised weights, computed where the weight is used.

A patched copy of a quantised layer would have to be quantised again, which is not what was asked for, or be kept in full,
which is what quantising is to avoid. So the patch is added to the layer's dequantised weight each time it is used:
memory grows by the LoRA, and the stored weight stays as it is.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.lora
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from rayltx.comfy_dist.gguf_spec import chosen_dtype


class PatchAtUse:
    """One of a layer's `weight_function`s."""

    def __init__(self, key: str, patches: list[Any], patch_dtype: str = "default", hook: bool = False) -> None:
        self.key, self.patches, self.patch_dtype, self.hook = key, patches, patch_dtype, hook

    def __call__(self, weight: Tensor) -> Tensor:
        """weight: (out, in), in what the layer computes in, or wider. ComfyUI adds to it in place, and may replace it."""
        dtype = chosen_dtype(self.patch_dtype, weight.dtype)
        return comfy.lora.calculate_weight(self.patches, weight, self.key, intermediate_dtype=dtype)

    def move_to(self, device: torch.device) -> int:
        """Bring the patch's tensors to the layer's device, once instead of at each use. Returns their bytes there."""
        moved = _Mover(device)
        self.patches = [(strength, moved(patch), *rest) for strength, patch, *rest in self.patches]
        return moved.num_bytes


class _Mover:
    def __init__(self, device: torch.device) -> None:
        self.device, self.num_bytes = device, 0

    def __call__(self, patch: Any) -> Any:
        if isinstance(patch, Tensor):
            self.num_bytes += patch.nbytes
            return patch.to(self.device)
        if isinstance(patch, (tuple, list)):
            return type(patch)(map(self, patch))
        if hasattr(patch, "weights"):  # one of ComfyUI's adapters
            other = copy.copy(patch)
            other.weights = self(patch.weights)
            return other
        return patch


def without_patches(functions: list[Any], hooks_only: bool = False) -> list[Any]:
    """A layer's functions without those that were put there here."""
    return [f for f in functions if not (isinstance(f, PatchAtUse) and (f.hook or not hooks_only))]


def is_quantised_weight(module: Any, name: str) -> bool:
    """Whether a module's parameter `name` would have to be quantised again to be patched."""
    if name != "weight" or not hasattr(module, "weight_function"):
        return False
    if getattr(module, "block_format", None) is not None or isinstance(module.weight, QuantizedTensor):
        return True
    return module.weight.dtype.itemsize == 1 and module.weight.dtype.is_floating_point
