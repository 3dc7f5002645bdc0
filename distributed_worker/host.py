"""What a worker needs of the model that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from rayltx.distributed_worker.worker_calls import collective
from rayltx.sequence_parallel.group import SequenceParallelGroup


class Host(Protocol):
    """A transformer on one rank. Built from a picklable specification and a device: `host_class(spec, device)`.

    A host can have more methods that are asked, under the marks of `worker_calls`.
    """

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Take some parameters, by official name. Those that stay on the CPU must stay the tensors that they are."""
        ...

    def finish_loading(self) -> None:
        """All parameters have been given."""
        ...

    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters by official name."""
        ...

    def module(self, name: str) -> object:
        """What a name stands for that was sent in an object's place (see `messages.Refer`)."""
        ...

    def close(self) -> None:
        """The model is about to be forgotten."""
        ...

    @collective
    def forward(self, group: SequenceParallelGroup, inputs: Any) -> Any:
        """One call of the model. Returns the answer on rank 0, None elsewhere. Raises user errors alike on every rank."""
        ...
