"""ComfyUI's layers on quantised blocks: dequantised where they are used, a layer at a time, on its device.

ComfyUI builds a model from a class of operations; this one is its own for everything but linear layers with blocks.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import comfy.ops
import torch
from torch import Tensor, nn

from rayltx.comfy_dist.gguf_spec import GGUFSpec
from rayltx.expansion.comfyui_gguf.checkpoint import BlockFormat


def gguf_operations(spec: GGUFSpec) -> Any:
    """The class to hand to ComfyUI as `custom_operations`."""

    class GGUFOperations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            """`weight` holds bytes where `block_format` says what they mean."""

            block_format: BlockFormat | None = None
            comfy_force_forward = True  # newer feed-forwards go past a layer whose weight they take for a plain one

            def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
                found = spec.formats.get(prefix + "weight")
                if found is None or prefix + "weight" not in state_dict:
                    super()._load_from_state_dict(state_dict, prefix, *args)
                    return
                self.block_format = found
                self.weight = nn.Parameter(state_dict[prefix + "weight"], requires_grad=False)
                if prefix + "bias" in state_dict:
                    self.bias = nn.Parameter(state_dict[prefix + "bias"], requires_grad=False)

            def forward_comfy_cast_weights(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if self.block_format is None:
                    return super().forward_comfy_cast_weights(input, *args, **kwargs)
                return _linear(self, self.block_format, spec, input)

    return GGUFOperations


def _linear(layer: Any, block_format: BlockFormat, spec: GGUFSpec, input: Tensor) -> Tensor:
    """The layer's output. Bytes that are elsewhere come by ComfyUI's own streams, ahead of what is computed now."""
    device, dtype = input.device, input.dtype
    stream = management.get_offload_stream(device) if layer.weight.device != device else None
    non_blocking = management.device_supports_non_blocking(device)
    data = management.cast_to(layer.weight, None, device, non_blocking=non_blocking, stream=stream)
    bias = layer.bias
    if bias is not None:
        copied = bool(layer.bias_function)  # patches add to it in place
        bias = management.cast_to(bias, dtype, device, non_blocking=non_blocking, copy=copied, stream=stream)
    management.sync_stream(device, stream)

    if layer.weight_function:
        # A patch is added before the one rounding to the layer's dtype.
        weight = block_format.dequantise(data, torch.float32, spec.compute_dtype(dtype))
        for function in layer.weight_function:
            weight = function(weight)
        weight = weight.to(dtype)
    else:
        weight = block_format.dequantise(data, dtype, spec.compute_dtype(dtype))
    for function in layer.bias_function:
        bias = function(bias)
    out = nn.functional.linear(input, weight, bias)
    if stream is not None:
        stream.wait_stream(management.current_stream(device))  # before it reuses the memory of the bytes
    return out
