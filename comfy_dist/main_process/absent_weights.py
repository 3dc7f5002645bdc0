"""The parameters of a MODEL whose weights are with the workers: they have shapes and dtypes, and no values.

What a node writes into such a parameter would be lost without a word, and what it reads ends in torch's own error about meta
tensors. Both are refused by the parameter's name. torch lets a class of tensors see every function that is called on it
(https://docs.pytorch.org/docs/stable/notes/extending.html), which is how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rayltx.errors import UnsupportedError

# Names of functions that write into the tensor that they are called on, besides those that end in an underscore.
_WRITING = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")
_HARMLESS = ("requires_grad_", "share_memory_", "retain_grad_")
_SENT = ("__reduce__", "__reduce_ex__")
_NAME = "rayltx_parameter_name"
_Plainly = torch._C.DisableTorchFunctionSubclass  # noqa: SLF001  # as torch's manual has it


class _WithoutValues:
    """Of which class a parameter without values is, and what is made from one."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        written = _written_by(func, args, kwargs)
        if isinstance(written, (AbsentWeight, _View)):
            raise UnsupportedError(
                f"a node writes into the weight {_name_of(written)} of this MODEL. Its weights are with the Ray workers, whom "
                "this does not reach: change weights by a LoRA or another weight patch (add_patches), which is forwarded, or "
                "use ComfyUI's own loader for this graph"
            )
        if getattr(func, "__name__", "") in _SENT:
            raise _unreadable(args[0])
        source = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, _WithoutValues)), None)
        with _Plainly():
            try:
                result = func(*args, **kwargs)
            except (NotImplementedError, RuntimeError, TypeError) as error:
                if "meta" not in str(error):
                    raise
                raise _unreadable(source) from error
        if type(result) is Tensor and source is not None:
            if result.is_meta:
                result.__class__ = _View if _is_view_of(result, source) else _Derived
                setattr(result, _NAME, _name_of(source))
            elif not _is_made_alike(func):
                # torch.mm takes such a tensor next to one that has values, and gives anything.
                raise _unreadable(source)
        return result


class AbsentWeight(_WithoutValues, nn.Parameter):
    """A parameter."""


class _View(_WithoutValues, Tensor):
    """Of a parameter: its `data`, a part of it, another shape of it."""


class _Derived(_WithoutValues, Tensor):
    """Computed from a parameter. It may be written, and has no values to be read."""


def mark_absent(model: nn.Module) -> None:
    """Have a model's parameters, which are on torch's meta device, refuse to be written or read."""
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_meta:
            parameter.__class__ = AbsentWeight
            setattr(parameter, _NAME, name)


def drop_values(model: nn.Module) -> None:
    """Make a model's parameters absent that have values, such as small ones, which were read: those that count are the workers'.

    Buffers stay: they are for nodes that use them here.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
    mark_absent(model)


def _written_by(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """The tensor that a call writes into, or gives other data; None for one that only reads."""
    name = getattr(func, "__name__", "")
    if kwargs.get("out") is not None:
        return kwargs["out"]
    if name == "__set__":
        is_data = getattr(getattr(func, "__self__", None), "__name__", "") == "data"
        return args[0] if is_data and not _is_same_data(*args) else None
    in_place = name.endswith("_") and not name.startswith("_") and name not in _HARMLESS
    if not in_place and name not in _WRITING:
        return None
    return args[0] if args else next(iter(kwargs.values()), None)  # as torch.nn.init calls itself, by name


def _is_made_alike(func: Callable[..., Any]) -> bool:
    """Whether a function takes no more from a tensor than its shape and dtype."""
    name = getattr(func, "__name__", "")
    return name.endswith("_like") or name.startswith("new_")


def _unreadable(read: object) -> UnsupportedError:
    return UnsupportedError(
        f"a node reads the weight {_name_of(read)} of this MODEL, or computes with it. Its weights are with the Ray workers: "
        "what is computed from them has to be done there, as by a patch; remove the node, or use ComfyUI's own loader for this "
        "graph"
    )


def _name_of(tensor: object) -> str:
    return str(getattr(tensor, _NAME, "(without a name)"))


def _is_view_of(result: Tensor, source: Any) -> bool:
    if isinstance(source, _Derived):
        return False
    with _Plainly():
        return result.untyped_storage()._cdata == source.untyped_storage()._cdata  # noqa: SLF001  # meta has no addresses


def _is_same_data(parameter: Tensor, data: Tensor) -> bool:
    """Whether a parameter would get what it has, as from `module.to` with the dtype that the module has."""
    with _Plainly():
        return data.is_meta and data.dtype == parameter.dtype and data.shape == parameter.shape
