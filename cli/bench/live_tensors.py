"""How many bytes of tensors live at once, and which lines of source made them."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rayltx.about import ROOT


class LiveTensors(TorchDispatchMode):
    """Counts the tensors that are made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.peak_bytes = 0  # the most that lived at once,
        self.held_at_peak: dict[str, int] = {}  # and by the line that made them
        self._living: dict[int, tuple[int, str]] = {}  # by storage: its bytes, and the line
        self._bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handed_in = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in handed_in and id(storage) not in self._living:
                    self._begin(storage)
        return out

    def _begin(self, storage: torch.UntypedStorage) -> None:
        self._living[id(storage)] = storage.nbytes(), _line()
        self._bytes += storage.nbytes()
        weakref.finalize(storage, self._end, id(storage))
        if self._bytes > self.peak_bytes:
            self.peak_bytes, by_line = self._bytes, Counter[str]()
            for num_bytes, line in self._living.values():
                by_line[line] += num_bytes
            self.held_at_peak = dict(by_line.most_common())

    def _end(self, number: int) -> None:
        self._bytes -= self._living.pop(number)[0]


def _line() -> str:
    """The innermost line that is not torch's."""
    frame = inspect.currentframe()
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    if frame is None:
        return "torch"
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(ROOT) if ROOT in path.parents and "site-packages" not in path.parts else path.name
    return f"{name}:{frame.f_lineno}"
