"""What a worker asks of the model that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from rayltx.sequence_parallel.group import SequenceParallelGroup


class Host(Protocol):
    """A transformer on one rank. Built from a picklable specification and a device: `host_class(spec, device)`."""

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Take some parameters, by official name. Those that stay on the CPU must stay the tensors that they are."""
        ...

    def finish_loading(self) -> None:
        """All parameters have been given."""
        ...

    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters by official name."""
        ...

    def forward(self, group: SequenceParallelGroup, inputs: Mapping[str, Any]) -> Any:
        """Collective. The answer on rank 0, None elsewhere. User errors are raised alike on every rank."""
        ...
