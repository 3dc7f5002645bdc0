"""Whose code runs: ComfyUI's own, of a known version where ours runs its layers in another order, or somebody else's."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
import types
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

_OURS = "rayltx"
_LAYERS_FROM = ("comfy", "torch", _OURS)
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def has_known_forward(module: nn.Module, known: Collection[str]) -> bool:
    """known: SHA-256 of the tokens of `forward`, which comments and lines' ends are none of; the first 16 digits."""
    if "forward" in module.__dict__:
        return False
    forward = type(module).forward
    # Its code, since the source of a function that wraps another is told to be the other's.
    return isinstance(forward, types.FunctionType) and _digest(forward.__code__) in known


@functools.cache
def _digest(code: types.CodeType) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(code))
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (OSError, SyntaxError, tokenize.TokenError):  # there is none, or a line of it that is a part of something
        return ""
    words = " ".join(token.string for token in tokens if token.type not in _LAYOUT)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def is_comfyuis(model: Any, name: str) -> bool:
    """Whether a method of the model is its class's, and that ComfyUI's."""
    return name not in vars(model) and has_comfyuis(type(model), name)


def has_comfyuis(model_class: type, name: str) -> bool:
    """Whether all that a class and those before it have of a method stands in ComfyUI's code, and something does."""
    found = [vars(each)[name] for each in model_class.__mro__ if name in vars(each)]
    origins = [getattr(method, "__globals__", {}).get("__name__", "") for method in found]
    return bool(found) and all(origin.startswith("comfy.") for origin in origins)


def is_untouched(module: nn.Module) -> bool:
    """Whether a module computes what a class of ComfyUI's, torch's or ours says, and nobody else looks on."""
    own = module.__dict__
    if "forward" in own or not _is_of_known_origin(type(module).forward):
        return False
    hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
    return all(type(hook).__module__.startswith(_OURS) for hook in hooks)


@functools.cache  # it is asked of each layer at each step
def _is_of_known_origin(forward: Callable[..., Any]) -> bool:
    """By where its code is: a function that wraps another says that it is from the other's module."""
    origin = getattr(forward, "__globals__", {}).get("__name__", "")
    return origin.partition(".")[0] in _LAYERS_FROM
