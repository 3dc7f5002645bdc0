"""How many bytes of tensors live at once."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the tensors that are made within it. `peak_bytes`: the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self._living: set[int] = set()
        self.living_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        handed_in = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in handed_in and id(storage) not in self._living:
                    self._begin(storage)
        return out

    def _begin(self, storage: torch.UntypedStorage) -> None:
        self._living.add(id(storage))
        self.living_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.living_bytes)
        weakref.finalize(storage, self._end, id(storage), storage.nbytes())

    def _end(self, number: int, num_bytes: int) -> None:
        self._living.discard(number)
        self.living_bytes -= num_bytes
