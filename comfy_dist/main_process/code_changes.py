"""What other packs have exchanged in ComfyUI's own LTX and attention code, in this process.

Some packs set another function on a class of ComfyUI's, or in place of one, when they are imported. The workers import
ComfyUI and no packs, so they would run the unpatched code. A method of a module's class is what an object patch on each such
module is, and is forwarded as that; another attention for everything, as the override that it is. The rest is refused by name.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayltx.comfy_dist.main_process.module_snapshot import RUNS_HERE

_ATTENTION = "comfy.ldm.modules.attention"
_FILES = (
    *(f"comfy.ldm.lightricks.{name}" for name in ("model", "av_model", "embeddings_connector", "symmetric_patchifier")),
    "comfy.ldm.common_dit",
)
_LAYERS = "comfy.ops"
_CHOSEN_ATTENTION = "optimized_attention"
_MASKED_ATTENTION = "optimized_attention_masked"  # which LTX models called up to ComfyUI 0.20
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_STANDARD_LIBRARY = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
_BY_ANOTHER_PACK = "(by another pack)"
_WITHIN = ("__wrapped__", "func", "__func__", "_torchdynamo_orig_callable")  # what a wrapper has of what it wraps
_DESCRIPTORS = (staticmethod, classmethod, property)

_attention_module: Any = importlib.import_module(_ATTENTION)
_as_imported = {name: getattr(_attention_module, name, None) for name in (_CHOSEN_ATTENTION, _MASKED_ATTENTION)}


def changed_methods(model: nn.Module) -> dict[str, types.FunctionType]:
    """Methods of the classes of a model's modules that are not ComfyUI's own, by module and method: `a.b.forward`."""
    found = {}
    by_class = {kind: _changed_methods_of(kind) for kind in {type(module) for module in model.modules()}}
    for name, module in model.named_modules():
        for method, function in by_class[type(module)].items():
            if name or method != RUNS_HERE:
                _no_longer_by_name(function)
                found[f"{name}.{method}".removeprefix(".")] = function
    return found


def _changed_methods_of(kind: type) -> dict[str, types.FunctionType]:
    """Of those that an instance has: one of a base class may have another of its name before it."""
    methods: dict[str, Any] = {}
    for base in kind.__mro__:
        if base.__module__.startswith("comfy.ldm."):
            for name, value in vars(base).items():
                methods.setdefault(name, value)
    return {
        name: value
        for name, value in methods.items()
        if isinstance(value, types.FunctionType) and not _is_dunder(name) and not is_of_comfyui(value)
    }


def changed_attention() -> Callable[..., Any] | None:
    """The function that was put in the place of ComfyUI's choice of attention, for all models; None if there is none."""
    now: Callable[..., Any] = getattr(_attention_module, _CHOSEN_ATTENTION)
    if not is_of_comfyui(now):
        _no_longer_by_name(now)
        return now
    return now if now is not _chosen_by_settings() else None


@functools.cache
def _chosen_by_settings() -> Callable[..., Any] | None:
    """ComfyUI's own choice, made again by its own statements: a pack may have exchanged it before this was imported."""
    statements = [
        statement
        for statement in ast.parse(_source_of(_ATTENTION)).body
        if isinstance(statement, (ast.Assign, ast.If)) and _CHOSEN_ATTENTION in _assigned_in(statement)
    ]
    # What it says while it chooses has been said.
    namespace: dict[str, Any] = {
        **vars(_attention_module),
        "logging": types.SimpleNamespace(info=lambda *_: None, error=lambda *_: None),
    }
    exec(compile(ast.Module(body=[*statements], type_ignores=[]), _ATTENTION, "exec"), namespace)
    return namespace[_CHOSEN_ATTENTION] if statements else _as_imported[_CHOSEN_ATTENTION]


def _assigned_in(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _no_longer_by_name(function: Any) -> None:
    """Have it cross with its code. functools.wraps gives it the name of what it took the place of, under which a worker would
    find its own.
    """
    if str(getattr(function, "__module__", "")).startswith("comfy."):
        with contextlib.suppress(AttributeError):
            function.__module__ = f"{function.__module__} {_BY_ANOTHER_PACK}"


def in_place_of_kernel(function: Callable[..., Any], kernel: object, *args: object, **kwargs: object) -> object:
    """An override, as ComfyUI calls it, that is a function in place of the kernel."""
    return function(*args, **kwargs)


def unforwardable_changes() -> list[str]:
    """What was changed and can be neither seen nor done by a worker, by name."""
    found = []
    if not isinstance(torch.nn.functional.scaled_dot_product_attention, types.BuiltinFunctionType):
        found.append("torch.nn.functional.scaled_dot_product_attention")
    masked = getattr(_attention_module, _MASKED_ATTENTION, None)
    if (
        _reads_masked_attention()
        and masked is not _as_imported[_MASKED_ATTENTION]
        and masked is not changed_attention()
    ):
        found.append(f"{_ATTENTION}.{_MASKED_ATTENTION}")
    for name in (*_FILES, _LAYERS):
        module = importlib.import_module(name)
        for defined, source in sorted(_names_of(name).items()):
            value = vars(module).get(defined)
            if source is not None:
                origin = getattr(sys.modules.get(source[0]), source[1], value)
                if value is not origin:
                    found.append(f"{name}.{defined}")
            elif isinstance(value, type):
                if value.__module__ != name:
                    found.append(f"{name}.{defined}, which is {value.__module__}.{value.__qualname__}")
                else:
                    found += [f"{name}.{defined}.{method}" for method in _other_changes_of(value, name == _LAYERS)]
            elif not is_of_comfyui(value):
                found.append(f"{name}.{defined}")
    return found


def _other_changes_of(kind: type, with_methods: bool) -> Iterator[str]:
    """Of a class's own: constructors and the like, and methods that are more than functions.

    with_methods: all methods, and those of the classes within.
    """
    for name, value in vars(kind).items():
        if with_methods and isinstance(value, type):
            if value.__module__ == kind.__module__:
                yield from (f"{name}.{method}" for method in _other_changes_of(value, with_methods))
            elif value.__module__.partition(".")[0] not in ("comfy", "torch"):
                yield name
            continue
        if isinstance(value, types.FunctionType):
            parts: list[Any] = [value] if with_methods or _is_dunder(name) else []
        elif isinstance(value, _DESCRIPTORS):
            parts = [getattr(value, part, None) for part in ("__func__", "fget", "fset")]
        else:
            parts = [value] if callable(value) and not isinstance(value, type) else []
        if any(part is not None and not is_of_comfyui(part) and not _is_installed(part) for part in parts):
            yield name


def is_of_comfyui(value: object) -> bool:
    """Whether a function, with all that it wraps, or what is callable in its place, is from ComfyUI's or torch's own files."""
    while value is not None:
        within = next((inner for part in _WITHIN if (inner := getattr(value, part, None)) is not None), None)
        file = _file_of(value)
        if file.startswith("<"):  # made at run time: by whom?
            home = str(getattr(value, "__globals__", {}).get("__name__", ""))
            if home.partition(".")[0] not in ("comfy", "torch", *sys.stdlib_module_names):
                return False
        elif within is not None and file.startswith(_STANDARD_LIBRARY) and not any(part in file for part in _INSTALLED):
            pass  # a decorator of Python's: what is within counts
        elif file and not file.startswith(_own_folders()):
            return False
        value = within
    return True


def _file_of(value: object) -> str:
    code = getattr(value, "__code__", None)
    if code is not None:
        return _real(code.co_filename)
    if isinstance(value, (functools.partial, types.MethodType)) or hasattr(value, "__wrapped__"):
        return ""  # what is within counts
    module = sys.modules.get(getattr(value, "__module__", None) or type(value).__module__)
    return _real(getattr(module, "__file__", None) or "")


def _is_installed(value: object) -> bool:
    """Whether it comes with Python or from an installed package, as what enumerations and the like have of theirs."""
    file = _file_of(value)
    return not file or any(folder in file for folder in _INSTALLED) or file.startswith(_STANDARD_LIBRARY)


@functools.cache
def _real(file: str) -> str:
    return os.path.realpath(file) if file and not file.startswith("<") else file


@functools.cache
def _own_folders() -> tuple[str, ...]:
    comfy = Path(_real(_attention_module.__file__)).parents[2]
    return f"{comfy}{os.sep}", f"{Path(_real(torch.__file__)).parent}{os.sep}"


@functools.cache
def _reads_masked_attention() -> bool:
    return _MASKED_ATTENTION in _source_of("comfy.ldm.lightricks.model")


@functools.cache
def _source_of(module: str) -> str:
    """The source of a module; "" where there is none to be read."""
    file = getattr(importlib.import_module(module), "__file__", None)
    try:
        return Path(file).read_text(encoding="utf-8") if file and file.endswith(".py") else ""
    except OSError:
        return ""


@functools.cache
def _names_of(module: str) -> Mapping[str, tuple[str, str] | None]:
    """What a module's source defines (None) or imports (from where, as what): others may have put more into the module."""
    names: dict[str, tuple[str, str] | None] = {}
    for statement in ast.parse(_source_of(module)).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names[statement.name] = None
        elif isinstance(statement, ast.ImportFrom):
            relative = "." * statement.level + (statement.module or "")
            origin = importlib.util.resolve_name(relative, module.rpartition(".")[0]) if statement.level else relative
            names |= {alias.asname or alias.name: (origin, alias.name) for alias in statement.names}
    return names


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
