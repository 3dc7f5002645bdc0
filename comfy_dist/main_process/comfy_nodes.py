"""ComfyUI's own nodes, called from ours: what they do stays theirs, through its updates."""

from __future__ import annotations

import importlib
from typing import Any

CUSTOM_SAMPLING = "comfy_extras.nodes_custom_sampler"
LIGHTRICKS = "comfy_extras.nodes_lt"
SOUND = "comfy_extras.nodes_lt_audio"


def call_node(module: str, name: str, **inputs: Any) -> tuple[Any, ...]:
    """Run a node of ComfyUI, written in its older or its newer way. Returns its outputs."""
    node = getattr(importlib.import_module(module), name)
    if hasattr(node, "define_schema"):
        return tuple(node.execute(**inputs).result)
    return tuple(getattr(node(), node.FUNCTION)(**inputs))
