"""One copy of the weights for all workers of a machine.

Rank 0 reads the checkpoint a portion at a time (a transformer block each), and Ray puts what it returns into the object
store; every worker maps the portion, and its parameters are views on it. Where the store cannot hold the file, the
workers map the file instead: one copy too, in the page cache, but one that the kernel may drop and read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.distributed_worker.messages import bytes_of_tensor, tensor_of_bytes
from rayltx.distributed_worker.shared_pages import protected_views


@dataclass(frozen=True)
class WeightPortion:
    """Some tensors of a checkpoint as Ray's object store holds them."""

    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]
    data: dict[str, np.ndarray]

    @classmethod
    def read(cls, checkpoint: Checkpoint, names: Sequence[str], dtypes: Mapping[str, torch.dtype]) -> WeightPortion:
        """Read from the file. dtypes: of tensors that are converted; the others stay as they are.

        Nothing is copied before Ray writes the portion into its store, unless it is converted.
        """
        with checkpoint.open() as reader:
            tensors = {name: reader.read(name, dtypes.get(name)) for name in names}
        return cls(
            {name: tensor.dtype for name, tensor in tensors.items()},
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            {name: bytes_of_tensor(tensor) for name, tensor in tensors.items()},
        )

    def map(self) -> dict[str, Tensor]:
        """Tensors on the store's own bytes, protected from writing. They keep the mapping alive."""
        views = protected_views(self.data)
        return {name: tensor_of_bytes(views[name], self.dtypes[name], self.shapes[name]) for name in self.data}


def map_file(checkpoint: Checkpoint, names: Sequence[str], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Tensors on a private mapping of the file: shared through the page cache, copied page by page where written."""
    with checkpoint.open() as reader:
        return {name: reader.read(name, dtypes.get(name)) for name in names}
