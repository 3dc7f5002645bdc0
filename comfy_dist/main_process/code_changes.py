"""What other packs have exchanged in ComfyUI's own LTX and attention code, in this process.

Some packs set another function on a class of ComfyUI's, or in place of one, when they are imported. The workers import
ComfyUI and no packs, so they would run the unpatched code. A method of a module's class is what an object patch on each such
module is, and is forwarded as that; another attention for everything, as the override that it is. The rest is refused by name.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

_ATTENTION = "comfy.ldm.modules.attention"
_FILES = tuple(
    f"comfy.ldm.lightricks.{name}" for name in ("model", "av_model", "embeddings_connector", "symmetric_patchifier")
)
_CHOSEN_ATTENTION = ("optimized_attention", "optimized_attention_masked")  # names in the attention module
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_STANDARD_LIBRARY = os.path.dirname(os.path.realpath(os.__file__)) + os.sep
_RUNS_HERE = ("forward",)  # of the model itself: around the call that goes to the workers

_attention_module: Any = importlib.import_module(_ATTENTION)
_as_imported = {name: getattr(_attention_module, name) for name in _CHOSEN_ATTENTION}


def changed_methods(model: nn.Module) -> dict[str, types.FunctionType]:
    """Methods of the classes of a model's modules that are not ComfyUI's own, by module and method: `a.b.forward`."""
    found = {}
    for name, module in model.named_modules():
        for kind in reversed(type(module).__mro__):
            for method, function in _changed_methods_of(kind).items():
                if name or method not in _RUNS_HERE:
                    found[f"{name}.{method}".removeprefix(".")] = function
    return found


def _changed_methods_of(kind: type) -> dict[str, types.FunctionType]:
    if not kind.__module__.startswith("comfy.ldm."):
        return {}
    return {
        name: value
        for name, value in vars(kind).items()
        if isinstance(value, types.FunctionType) and not _is_dunder(name) and not is_of_comfyui(value)
    }


def changed_attention() -> Callable[..., Any] | None:
    """The function that was put in the place of ComfyUI's choice of attention, for all models; None if there is none."""
    for name, before in _as_imported.items():
        now = getattr(_attention_module, name, None)
        if now is not None and (now is not before or not is_of_comfyui(now)):
            return now
    return None


def in_place_of_kernel(function: Callable[..., Any], kernel: object, *args: object, **kwargs: object) -> object:
    """An override, as ComfyUI calls it, that is a function in place of the kernel."""
    return function(*args, **kwargs)


def unforwardable_changes() -> list[str]:
    """What was changed and can be neither seen nor done by a worker, by name."""
    found = []
    for name in _FILES:
        module = importlib.import_module(name)
        for defined in sorted(_names_of(module.__file__ or "")):
            value = vars(module).get(defined)
            if isinstance(value, type):
                if value.__module__.partition(".")[0] != "comfy" and not _is_installed(value):
                    found.append(f"{name}.{defined}, which is {value.__module__}.{value.__qualname__}")
                elif value.__module__ == name:
                    found += [f"{name}.{defined}.{method}" for method in _other_changes_of(value)]
            elif callable(value) and not is_of_comfyui(value) and not _is_installed(value):
                found.append(f"{name}.{defined}")
    return found


def _other_changes_of(kind: type) -> Iterator[str]:
    for name, value in vars(kind).items():
        functions = [getattr(value, part, None) for part in ("__func__", "fget", "func")]
        function = value if isinstance(value, types.FunctionType) and _is_dunder(name) else None
        for part in (function, *functions):
            if isinstance(part, types.FunctionType) and not is_of_comfyui(part) and not _is_installed(part):
                yield name


def is_of_comfyui(value: object) -> bool:
    """Whether a function's code, or what is callable in its place, is from ComfyUI's or torch's own files."""
    file = _file_of(value)
    return not file or file.startswith(("<", *_own_folders()))  # "<string>": made by dataclasses and the like


def _file_of(value: object) -> str:
    while isinstance(value, (functools.partial, types.MethodType)) or (
        not hasattr(value, "__code__") and hasattr(value, "__wrapped__")
    ):
        value = getattr(value, "func", None) or getattr(value, "__func__", None) or getattr(value, "__wrapped__", None)
    code = getattr(value, "__code__", None)
    if code is not None:
        return _real(code.co_filename)
    module = sys.modules.get(getattr(value, "__module__", None) or type(value).__module__)
    return _real(getattr(module, "__file__", None) or "")


def _is_installed(value: object) -> bool:
    """Whether it comes with Python or from an installed package."""
    file = _file_of(value)
    if not file:  # made by C, or by something that is no module
        return (getattr(value, "__module__", None) or "").partition(".")[0] in ("", *sys.stdlib_module_names)
    return any(folder in file for folder in _INSTALLED) or file.startswith(_STANDARD_LIBRARY)


@functools.cache
def _real(file: str) -> str:
    return os.path.realpath(file) if file and not file.startswith("<") else file


@functools.cache
def _own_folders() -> tuple[str, ...]:
    comfy = Path(_real(_attention_module.__file__)).parents[2]
    return f"{comfy}{os.sep}", f"{Path(_real(torch.__file__)).parent}{os.sep}"


@functools.cache
def _names_of(file: str) -> frozenset[str]:
    """What a source file defines and imports by itself: others may have put more into the module, which nothing calls."""
    names: set[str] = set()
    for statement in ast.parse(Path(file).read_bytes()).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in statement.names}
    return frozenset(names)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
