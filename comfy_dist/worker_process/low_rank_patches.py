"""LoRAs next to a quantised product.

ComfyUI multiplies some quantised layers as they are, in fp8 or fp4, but not one whose weight has a function to run:
that one is dequantised, patched and multiplied in full at each use. A LoRA needs none of it. Its delta is a product of two
thin matrices, which is applied to the layer's input by itself, in the dtype of that: W x + B (A x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rayltx.comfy_dist.comfy_types import Layer
from rayltx.comfy_dist.marks import LOW_RANK_PATCHES

# ComfyUI's feed-forward multiplies these weights itself, past the layer and its hooks, unless they have a function.
_PAST_THE_LAYER = ("TensorWiseINT8Layout",)
# Of a layer: newer ones multiply other weights themselves, too, but for layers that say this.
_FORCE_FORWARD = "comfy_force_forward"


def multiplies_quantised(layer: Layer) -> bool:
    """Whether ComfyUI multiplies this layer without dequantising it, as long as its weight has no function."""
    if getattr(layer, "pre_quant_scale", None) is not None:
        return False  # its weight is for an input that the layer changes first
    if isinstance(layer.weight, QuantizedTensor):
        if getattr(layer, "layout_type", None) in _PAST_THE_LAYER:
            return False
        return not getattr(layer, "_full_precision_mm", False)
    return isinstance(layer, comfy.ops.fp8_ops.Linear) and layer.weight.dtype == torch.float8_e4m3fn


@dataclass
class LowRank:
    """A LoRA's delta of a weight: factor * up @ down. up: (out, rank), down: (rank, in)."""

    up: Tensor
    down: Tensor
    factor: float

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """out: (..., out), added to in place; x: (..., in), what the layer got. In the dtype of `out`."""
        down, up = self.down.to(x.dtype), self.up.to(out.dtype)
        thin = torch.nn.functional.linear(x, down).to(out.dtype)
        out.view(-1, out.shape[-1]).addmm_(thin.reshape(-1, thin.shape[-1]), up.T, alpha=self.factor)


def low_rank_of(patches: Sequence[Any], device: torch.device) -> list[LowRank] | None:
    """The patches of a weight as low-rank products on a device; None if one of them is anything else.

    patches: as a ModelPatcher holds them: (strength, patch, strength of the weight itself, offset, function).
    """
    found = []
    for strength, patch, weight_strength, offset, function in patches:
        if type(patch) is not LoRAAdapter or weight_strength != 1.0 or offset is not None or function is not None:
            return None
        up, down, alpha, mid, dora_scale, reshape = patch.weights
        if mid is not None or dora_scale is not None or reshape is not None or up.ndim != 2 or down.ndim != 2:
            return None
        factor = strength * (1.0 if alpha is None else float(alpha) / down.shape[0])
        found.append(LowRank(up.to(device), down.to(device), factor))
    return found


class LowRankAtUse:
    """A layer's forward hook: adds a weight's LoRAs to what the layer gives."""

    def __init__(self, source: list[Any], products: list[LowRank], device: torch.device) -> None:
        """source: the patches that the products are."""
        self.source, self.products, self.device = source, products, device
        self.handle: RemovableHandle | None = None

    def __call__(self, layer: Layer, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x = args[0].dequantize() if isinstance(args[0], QuantizedTensor) else args[0]
        out = out.contiguous()
        for product in self.products:
            product.add_to(out, x)
        return out


def take_low_rank_patches(layer: Layer) -> list[LowRankAtUse]:
    """Take a layer's LoRAs off it."""
    taken: list[LowRankAtUse] = layer.__dict__.pop(LOW_RANK_PATCHES, [])
    if taken:
        layer.__dict__.pop(_FORCE_FORWARD, None)
    for hook in taken:
        if hook.handle is not None:
            hook.handle.remove()
    return taken


def put_low_rank_patches(
    layer: Layer, sources: Sequence[list[Any]], device: torch.device, before: Sequence[LowRankAtUse]
) -> bool:
    """Make these, in order, the LoRAs of a layer. Returns whether that is what they all are; nothing is changed otherwise.

    before: those that it had, whose tensors may be on the device already.
    """
    hooks = []
    for source in sources:
        same = [hook for hook in before if hook.source is source and hook.device == device]
        products = same[0].products if same else low_rank_of(source, device)
        if products is None:
            return False
        hooks.append(LowRankAtUse(source, products, device))
    for hook in hooks:
        hook.handle = layer.register_forward_hook(hook)
    layer.__dict__[LOW_RANK_PATCHES] = hooks
    layer.__dict__[_FORCE_FORWARD] = True
    return True
