"""One scale for the whole input of a layer that quantises it by its largest value.

ComfyUI's NVFP4 layers without an `input_scale` in the file divide their input by what its largest value needs. A rank's part
of the tokens has another largest value than the whole, and so other roundings: the ranks agree on one.
Of the formats that ComfyUI has, this is the only one with a scale for all tokens: fp8 takes its scale from the file or none,
MXFP8 and int8 take one for a block or a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from rayltx.sequence_parallel.group import SequenceParallelGroup

_LAYOUT = "TensorCoreNVFP4Layout"
_LARGEST = 448.0 * 6.0  # of a block's scale in fp8, times that of a value in fp4


@contextlib.contextmanager
def agreed_input_scales(model: nn.Module, group: SequenceParallelGroup) -> Iterator[None]:
    """Within the `with`, give such layers of the model the scale of all ranks' inputs together, at each call.

    Collective: all ranks of the group call the same layers in the same order, equally often. Costs a small all-reduce for each
    input.
    """
    with contextlib.ExitStack() as scope:
        if group.world is not None:
            agreement = _Agreement(group.world)
            for layer in model.modules():
                if _scales_its_input(layer):
                    scope.callback(layer.register_forward_pre_hook(agreement.give_scale).remove)
                    scope.callback(layer.__dict__.pop, "input_scale", None)
        yield


def rounds_by_all_tokens(layer: nn.Module) -> bool:
    """Whether all of its input counts for how each value of it is rounded: it cannot be called with some tokens at a time."""
    return _scales_its_input(layer) and _quantises(layer)


def _scales_its_input(layer: nn.Module) -> bool:
    # By the instance's own attributes: this is asked of every module at every step.
    return layer.__dict__.get("layout_type") == _LAYOUT and getattr(layer, "input_scale", None) is None


class _Agreement:
    """The last input and its scale: query, key and value have one input."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._input: Tensor | None = None
        self._scale: Tensor | None = None

    def give_scale(self, layer: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if not _quantises(layer):
            return
        smoothing = getattr(layer, "pre_quant_scale", None)
        if smoothing is None and x is self._input:
            layer.input_scale = self._scale
            return
        largest = (x if smoothing is None else x * smoothing.to(x)).abs().amax()
        agreed = largest.float()  # gloo has no bfloat16
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._group)
        # Divided in the input's dtype, as ComfyUI does: in another the scale would round otherwise.
        scale = layer.input_scale = agreed.to(largest.dtype) / _LARGEST
        self._input, self._scale = (x, scale) if smoothing is None else (None, None)


def _quantises(layer: Any) -> bool:
    """Whether ComfyUI multiplies in fp4 in this call. Not on a card that cannot, nor with a patch that is added at use."""
    if getattr(layer, "_full_precision_mm", False) or getattr(layer, "comfy_force_cast_weights", False):
        return False
    return not layer.weight_function and not layer.bias_function
