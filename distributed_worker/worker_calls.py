"""What a worker is asked, as values that the type checker follows.

A call names the method itself, as in `ask(Worker.join, rank, config, ...)`: a misspelt method or a wrong argument is an
error of the type checker, and "go to definition" leads to what the worker runs. What is asked of the model that a worker
runs, its host, is written the same way: `ask(ComfyHost.set_patches, state)`, or `ask_together(ComfyHost.forward, inputs)`
for a method that takes the group.

Every method that can be asked has one of two marks, which say who runs it and what a failure costs:

@collective   All ranks of the group run it at once, and wait for each other in it. A failure that not all of them share
              leaves them out of step: the group is formed anew, and workers that are gone are replaced. After a failure
              that all share, and out of memory, it is formed anew too, and nobody is replaced who answers; after a user
              error it is whole.
@individual   A worker runs it by itself, one or many at a time. The group stays usable if all who were asked fail alike;
              if only some do, the workers no longer hold the same, and the group is formed anew. Out of memory leaves it as
              it is, and who asked asks again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Concatenate, Generic, ParamSpec, TypeVar

from rayltx.sequence_parallel.group import SequenceParallelGroup

_Asked = TypeVar("_Asked")
_Result = TypeVar("_Result")
_Params = ParamSpec("_Params")
_Method = TypeVar("_Method", bound=Callable[..., object])


class CallKind(Enum):
    COLLECTIVE = "collective"
    INDIVIDUAL = "individual"


_KIND = "rayltx_call_kind"  # on a function


def collective(method: _Method) -> _Method:
    """Mark a method that all ranks of the group run at once."""
    setattr(method, _KIND, CallKind.COLLECTIVE)
    return method


def individual(method: _Method) -> _Method:
    """Mark a method that a worker runs by itself."""
    setattr(method, _KIND, CallKind.INDIVIDUAL)
    return method


def kind_of(method: Callable[..., object]) -> CallKind | None:
    """How a method is marked; None for one that cannot be asked."""
    return getattr(method, _KIND, None)


@dataclass(frozen=True)
class Call(Generic[_Asked, _Result]):
    """A method of the class `_Asked`, with its arguments, that gives a `_Result` where it runs. Picklable."""

    method: str
    kind: CallKind
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = field(default_factory=dict)


def ask(
    method: Callable[Concatenate[_Asked, _Params], _Result], *args: _Params.args, **kwargs: _Params.kwargs
) -> Call[_Asked, _Result]:
    """A call of a marked method with these arguments."""
    kind = kind_of(method)
    assert kind is not None, f"{method.__qualname__} is marked neither @collective nor @individual"
    return Call(method.__name__, kind, args, kwargs)


def ask_together(
    method: Callable[Concatenate[_Asked, SequenceParallelGroup, _Params], _Result],
    *args: _Params.args,
    **kwargs: _Params.kwargs,
) -> Call[_Asked, _Result]:
    """A call of a host's method that takes the group first, which each rank hands in. Its result is rank 0's."""
    kind = kind_of(method)
    assert kind is CallKind.COLLECTIVE, f"{method.__qualname__} takes the group, and is not marked @collective"
    return Call(method.__name__, kind, args, kwargs)
