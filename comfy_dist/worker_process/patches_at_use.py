"""Patches of quantised weights, computed where the weight is used.

A patched copy of a quantised layer would have to be quantised again, which is not what was asked for, or be kept in full,
which is what quantising is to avoid. So the patch is added to the layer's dequantised weight each time it is used:
memory grows by the LoRA, and the stored weight stays as it is. Layers that are multiplied without being dequantised, and whose
patches are LoRAs, stay so: see `low_rank_patches`.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import LowVramPatch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from rayltx.comfy_dist.comfy_types import Layer
from rayltx.comfy_dist.gguf_spec import chosen_dtype
from rayltx.comfy_dist.worker_process.low_rank_patches import (
    multiplies_quantised,
    put_low_rank_patches,
    take_low_rank_patches,
)


class PatchAtUse:
    """One of a layer's `weight_function`s."""

    def __init__(self, key: str, patches: list[Any], patch_dtype: str, device: torch.device) -> None:
        """patches: as a ModelPatcher holds them for the weight `key`. Their tensors are brought to the layer's device."""
        self.key, self.source, self.patch_dtype, self.device = key, patches, patch_dtype, device
        self.patches = [(strength, _to_device(patch, device), *rest) for strength, patch, *rest in patches]

    def __call__(self, weight: Tensor) -> Tensor:
        """weight: (out, in), in what the layer computes in, or wider. ComfyUI adds to it in place, and may replace it."""
        dtype = chosen_dtype(self.patch_dtype, weight.dtype)
        return comfy.lora.calculate_weight(self.patches, weight, self.key, intermediate_dtype=dtype)


def _to_device(patch: Any, device: torch.device) -> Any:
    if isinstance(patch, Tensor):
        return patch.to(device)
    if isinstance(patch, (tuple, list)):
        return type(patch)(_to_device(part, device) for part in patch)
    if hasattr(patch, "weights"):  # one of ComfyUI's adapters
        other = copy.copy(patch)
        other.weights = _to_device(patch.weights, device)
        return other
    return patch


def set_patches_at_use(
    layer: Layer, key: str, sources: list[list[Any]], patch_dtype: str, device: torch.device
) -> None:
    """Make these, in order, the patches of a quantised layer, in place of any that it had.

    What else is among its functions stays, before them. ComfyUI's own patches for layers that it leaves on the host go:
    they are the same patches in another form.
    """
    before = take_low_rank_patches(layer)
    had = [f for f in layer.weight_function if isinstance(f, PatchAtUse)]
    others = [f for f in layer.weight_function if not isinstance(f, (PatchAtUse, LowVramPatch))]
    if not sources and len(others) == len(layer.weight_function):
        return
    layer.weight_function = others
    if not others and multiplies_quantised(layer) and put_low_rank_patches(layer, sources, device, before):
        return
    patches = []
    for source in sources:
        same = [patch for patch in had if patch.source is source and patch.device == device]
        patches.append(same[0] if same else PatchAtUse(key, source, patch_dtype, device))
    layer.weight_function = [*others, *patches]


def is_quantised_weight(module: Layer, name: str) -> bool:
    """Whether a module's parameter `name` would have to be quantised again to be patched."""
    if name != "weight" or not hasattr(module, "weight_function") or module.weight is None:
        return False
    if getattr(module, "block_format", None) is not None or isinstance(module.weight, QuantizedTensor):
        return True
    return module.weight.dtype.itemsize == 1 and module.weight.dtype.is_floating_point
