"""What is changed in place, on the MODEL of this process or in ComfyUI's code, on its way to the workers.

What can be had exactly by ComfyUI's own means is forwarded as such, and proved as patches are; the rest is refused by name.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from rayltx.comfy_dist.main_process.code_changes import (
    changed_attention,
    changed_methods,
    in_place_of_kernel,
    unforwardable_changes,
)
from rayltx.comfy_dist.main_process.forwarding import MODEL_PREFIX
from rayltx.comfy_dist.main_process.module_snapshot import ModuleSnapshot
from rayltx.errors import UnsupportedError, listed

logger = logging.getLogger(__name__)


class InPlaceChanges:
    """Since a model was loaded, and in the code that it runs."""

    def __init__(self, model: nn.Module) -> None:
        self._as_loaded = ModuleSnapshot(model)
        self._bound: dict[str, tuple[object, object]] = {}  # the same objects each time, by which patches are compared
        self._told: set[str] = set()

    def object_patches(self, model: nn.Module) -> dict[str, object]:
        """What was set in place of modules' methods, as object patches. Raises UnsupportedError that names anything else."""
        changes = self._as_loaded.changes(model) + unforwardable_changes()
        if changes:
            raise UnsupportedError(
                "a node or another pack has changed this MODEL or ComfyUI's code in place, which the workers do not see: "
                f"{listed(changes, separator='; ')}. Patches as ComfyUI has them (add_object_patch, LoRAs, hooks) are "
                "forwarded; remove the node or pack that does otherwise and load the model again, or use ComfyUI's own loader "
                "for this graph"
            )
        found: dict[str, object] = {}
        for name, function in changed_methods(model).items():
            module = model.get_submodule(name.rpartition(".")[0])
            found[name] = self._once(name, function, functools.partial(types.MethodType, function, module))
        for name, method in self._as_loaded.set_methods(model).items():
            found[name] = method
        self._tell(found.keys())
        return {MODEL_PREFIX + name: value for name, value in found.items()}

    def attention_override(self) -> Callable[..., Any] | None:
        """The function that was put in the place of every attention of ComfyUI's, as an override of the kernel."""
        function = changed_attention()
        if function is None:
            return None
        self._tell(("ComfyUI's choice of attention",))
        return self._once("attention", function, functools.partial(functools.partial, in_place_of_kernel, function))

    def _once(self, name: str, key: object, make: Callable[[], Any]) -> Any:
        known = self._bound.get(name)
        if known is None or known[0] is not key:
            known = self._bound[name] = key, make()
        return known[1]

    def _tell(self, names: Any) -> None:
        new = [name for name in names if name not in self._told]
        self._told.update(new)
        if new:
            logger.info("changed in place by another pack, and forwarded: %s", listed(new))
