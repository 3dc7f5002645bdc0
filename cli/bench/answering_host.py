"""A model that computes nothing, and answers with what it was sent: what is left is the cost of asking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from rayltx.sequence_parallel.group import SequenceParallelGroup

ANSWERING_HOST = f"{__name__}:AnsweringHost"


class AnsweringHost:
    """A host, as `distributed_worker/host.py` has it."""

    def __init__(self, spec: object, device: str) -> None:
        pass

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        pass

    def finish_loading(self) -> None:
        pass

    def parameters(self) -> dict[str, Tensor]:
        return {}

    def module(self, name: str) -> object:
        raise KeyError(name)

    def close(self) -> None:
        pass

    def forward(self, group: SequenceParallelGroup, inputs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The latent, if one came: ranks wait for each other, as a model's do. Collective."""
        if group.world is not None:
            dist.barrier(group.world)
        if group.rank != 0:
            return None
        return {name: tensor for name, tensor in inputs.items() if name == "latent"}
