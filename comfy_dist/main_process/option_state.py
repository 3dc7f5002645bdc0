"""Whether transformer options are what they were, told without pickling them.

A step's options hold patches: closures and objects, whose flags a guider may flip between two calls. Comparing them by identity
would miss that, and pickling them at every call costs milliseconds. So what they are made of is walked.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_KNOWN_MODULES = ("torch", "numpy", "comfy", "einops", *sys.stdlib_module_names)  # that keep no state of a patch's
_OF_EVERY_CLASS = ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slotnames__")
_CONTAINERS = (dict, list, tuple, set, frozenset)
_SMALL_BYTES = 4096  # of a tensor that is looked into
_DEFAULT_STATE: Any = getattr(object, "__getstate__", None)  # from Python 3.11 on each object has one


class Unknown(Exception):
    """Something whose state cannot be seen from here."""


class OptionState:
    """What options were made of at one moment. It keeps all of it alive, so that identities count."""

    def __init__(
        self, options: Mapping[str, object], is_sent_whole: Callable[[Any], bool], refer: Callable[[object], str | None]
    ) -> None:
        """is_sent_whole: whether a function or class is sent with its code, and not by its name.

        refer: the name of what is not sent, as in `messages.pack`.
        Raises Unknown for options that hold something whose state cannot be seen.
        """
        self._is_sent_whole, self._refer = is_sent_whole, refer
        self._kept: list[object] = []
        self._seen: dict[int, int] = {}  # in which order
        self.atoms = tuple(self._walk(options))

    def is_same(self, other: OptionState | None) -> bool:
        return other is not None and self.atoms == other.atoms

    def _walk(self, value: Any) -> Iterator[object]:
        if type(value) in _PLAIN or isinstance(value, enum.Enum):
            yield type(value)
            yield value
            return
        # ComfyUI copies the containers at every step.
        yield (type(value), len(value)) if type(value) in _CONTAINERS else id(value)
        if id(value) in self._seen:
            yield self._seen[id(value)]
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        for part in self._parts_of(value):
            yield from self._walk(part)

    def _parts_of(self, value: Any) -> Iterator[object]:
        if isinstance(value, Tensor):
            if value.nbytes > _SMALL_BYTES or value.device.type != "cpu":
                raise Unknown  # what inference mode writes into it is not counted
            yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        elif type(value) is dict:
            yield from value.keys()
            yield from value.values()
        elif type(value) in _CONTAINERS:
            yield from value
        elif isinstance(value, types.FunctionType):
            yield from self._parts_of_function(value)
        elif isinstance(value, types.MethodType):
            yield from (value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)
        elif isinstance(value, types.ModuleType):
            if value.__name__.partition(".")[0] not in _KNOWN_MODULES:
                raise Unknown
        elif isinstance(value, types.BuiltinFunctionType):
            if not isinstance(value.__self__, (types.ModuleType, type(None))):
                yield value.__self__
        elif isinstance(value, type):
            yield from self._parts_of_class(value)
        elif isinstance(value, nn.Module):
            if self._refer(value) is None:
                raise Unknown
        else:
            yield from self._parts_of_instance(value)

    def _parts_of_function(self, function: types.FunctionType) -> Iterator[object]:
        if not self._is_sent_whole(function):
            return
        yield function.__code__.co_code
        yield vars(function)
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled in yet
                yield None
        yield from (function.__globals__[name] for name in _names_in(function.__code__) if name in function.__globals__)

    def _parts_of_class(self, kind: type) -> Iterator[object]:
        for base in kind.__mro__:
            if base is object or not self._is_sent_whole(base):
                continue
            for name, value in vars(base).items():
                if isinstance(value, (staticmethod, classmethod)):
                    yield value.__func__
                elif isinstance(value, property):
                    yield from (value.fget, value.fset)
                elif name not in _OF_EVERY_CLASS:
                    yield value

    def _parts_of_instance(self, value: Any) -> Iterator[object]:
        kind = type(value)
        own_ways = any(hasattr(kind, name) for name in ("__slots__", "__getnewargs__", "__getnewargs_ex__"))
        if own_ways or not hasattr(value, "__dict__") or kind.__reduce_ex__ is not object.__reduce_ex__:
            raise Unknown
        if kind.__reduce__ is not object.__reduce__ or getattr(kind, "__getstate__", None) is not _DEFAULT_STATE:
            raise Unknown
        yield kind
        yield vars(value)


def _names_in(code: types.CodeType) -> Iterator[str]:
    """The names that code reads, with those of functions and comprehensions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
