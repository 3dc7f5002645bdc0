"""Models of ComfyUI's made on tensors that exist, in place of copies of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def on_given_tensors() -> Iterator[None]:
    """Have modules that are made within the `with` take the tensors that they load, in place of copies of them.

    Parameters have no memory before that; what a model computes for itself when it is made, it has.
    """
    module: Any = nn.Module
    register, load = module.register_parameter, module.load_state_dict

    def register_without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
        register(self, name, param)

    def load_assigning(self: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = True) -> Any:
        module.register_parameter = register  # by which each is assigned
        return load(self, state_dict, strict, assign=True)

    module.register_parameter, module.load_state_dict = register_without_memory, load_assigning
    try:
        yield
    finally:
        module.register_parameter, module.load_state_dict = register, load
