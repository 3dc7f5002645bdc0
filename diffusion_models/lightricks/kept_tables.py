"""The tables of rotary position embeddings, which no step changes.

A model makes them of its tokens' positions in each forward. They are kept for the next, and taken where the positions have the
same numbers and everything else that they are made of is the same, never by shape or step. Those of the last forward alone are
kept, which has held them anyway, so that nothing is held at a step's peak that was not before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class _Tables:
    positions: Tensor  # a copy: what it was made from may be written to
    made_of: tuple[object, ...]
    tables: Any
    forward: int  # the last that took them


class KeptTables:
    def __init__(self) -> None:
        self._kept: list[_Tables] = []
        self._forward = 0

    def forget(self) -> None:
        """When the memory is wanted, and where somebody may have written to them."""
        self._kept = []

    @contextlib.contextmanager
    def in_forward(self) -> Iterator[None]:
        """A forward of the model runs within the `with`."""
        self._forward += 1
        with contextlib.ExitStack() as failed:
            failed.callback(self.forget)  # the memory may be what was lacking
            yield
            failed.pop_all()

    def tables(self, make: Callable[..., Any], model: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`make(positions, ...)`, or what it was for the same. The caller does not write to it.

        make: the model's own method, which nobody has replaced. What it takes of the model are attributes that hold a number, a
        word, a list of them or a function.
        """
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            return make(positions, *args, **kwargs)
        own = {name: value for name, value in vars(model).items() if not name.startswith("_") and _is_plain(value)}
        made_of = (repr(args), repr(sorted(kwargs.items())), tuple(sorted((k, _as_key(v)) for k, v in own.items())))
        for kept in self._kept:
            if kept.made_of == made_of and _are_equal(kept.positions, positions):
                kept.forward = self._forward
                return kept.tables
        self._kept = [kept for kept in self._kept if kept.forward == self._forward]
        kept = _Tables(positions.clone(), made_of, make(positions, *args, **kwargs), self._forward)
        self._kept.append(kept)
        return kept.tables

    def __len__(self) -> int:
        return len(self._kept)


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str, list, tuple, type(None))) or callable(value)


def _as_key(value: object) -> str:
    return f"{id(value)}" if callable(value) else repr(value)


def _are_equal(a: Tensor, b: Tensor) -> bool:
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and torch.equal(a, b)
