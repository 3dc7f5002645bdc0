"""The embedded host on quantised weights: linear layers whose blocks are dequantised where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayltx.diffusion_models.lightricks.diffusers_host import DiffusersHost
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.expansion.comfyui_gguf.checkpoint import BlockFormat, GGUFCheckpoint

HOST = "rayltx.expansion.comfyui_gguf.diffusers_host:GGUFDiffusersHost"


class QuantisedLinear(nn.Module):
    """`nn.Linear` on blocks. Built without memory; the bytes are assigned, and stay what they were given."""

    def __init__(self, block_format: BlockFormat, has_bias: bool) -> None:
        super().__init__()
        self.block_format = block_format
        self.out_features, self.in_features = block_format.shape
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8, device="meta"), requires_grad=False)
        bias = torch.empty(block_format.shape[0], device="meta")
        self.bias = nn.Parameter(bias, requires_grad=False) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in), any float dtype. Returns (..., out)."""
        return nn.functional.linear(x, self.block_format.dequantise(self.weight, x.dtype), self.bias)


@dataclass(frozen=True)
class QuantisedModel:
    """How to build a model on blocks. Picklable."""

    model: DiffusersModel
    formats: Mapping[str, BlockFormat]  # of the weights that stay blocks, by official name
    dtypes: Mapping[str, torch.dtype]  # of all others: what they are converted to when they are read

    @classmethod
    def of_checkpoint(cls, checkpoint: GGUFCheckpoint, dtype: torch.dtype) -> QuantisedModel:
        """dtype: what the model computes in. Raises as `DiffusersModel.of_checkpoint`."""
        model = DiffusersModel.of_checkpoint(checkpoint)
        modules = dict(model.build().named_modules())
        linear = {
            official
            for name, official in model.names.items()
            if name.endswith(".weight") and isinstance(modules[name.removesuffix(".weight")], nn.Linear)
        }
        formats = {name: block_format for name, block_format in checkpoint.quantised.items() if name in linear}
        return cls(model, formats, {name: dtype for name in checkpoint.tensors if name not in formats})


class GGUFDiffusersHost(DiffusersHost):
    """A `Host` for a QuantisedModel."""

    def __init__(self, spec: QuantisedModel, device: str = "cpu") -> None:
        super().__init__(spec.model, device)
        self._formats = spec.formats
        for official, block_format in spec.formats.items():
            name = self._official[official].removesuffix(".weight")
            has_bias = self._transformer.get_submodule(name).bias is not None
            self._transformer.set_submodule(name, QuantisedLinear(block_format, has_bias))

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """As `DiffusersHost.assign`; blocks are taken as the bytes that they are."""
        super().assign({name: tensor for name, tensor in tensors.items() if name not in self._formats})
        for official in tensors.keys() & self._formats.keys():
            layer = self._transformer.get_submodule(self._official[official].removesuffix(".weight"))
            layer.weight = nn.Parameter(tensors[official].to(self.device), requires_grad=False)
