"""ComfyUI's ModelPatcher for weights that other processes share.

Parameters are views on shared memory. ComfyUI patches some weights by replacing the parameter, which is fine: only what
is patched becomes private, and goes when it is unpatched. But it writes hook LoRAs into the parameter itself, and copies
parameters back from the GPU on unloading. Here a parameter is made private before a hook writes to it, and every
parameter's view is its own backup, so that unloading puts the view back.

Worked out on ComfyUI 0.8 to 0.33 without dynamic VRAM, which a worker never has: only ComfyUI's main program turns it on.
"""

from __future__ import annotations

import collections
from typing import Any

import comfy.model_patcher
import comfy.utils
from torch import Tensor

_Backup = collections.namedtuple("_Backup", ["weight", "inplace_update"])


class RemoteHooks:
    """The weight patches of some hooks, as the ComfyUI process combined them for this step.

    Stands in for ComfyUI's HookGroup, whose strengths change with the sampling step there.
    """

    def __init__(self, key: str, combined: dict[str, list[Any]]) -> None:
        self.key, self.combined = key, combined

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteHooks) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


class SharedWeightPatcher(comfy.model_patcher.ModelPatcher):
    """Never writes to a parameter that it was given."""

    @property
    def _hook_views(self) -> dict[str, Tensor]:
        """The views in whose place hooks have a private copy. Kept on the model, which clones of the patcher share."""
        return self.model.__dict__.setdefault("rayltx_hook_views", {})

    def load(self, *args: Any, **kwargs: Any) -> Any:
        for key, parameter in self.model.named_parameters():
            if parameter.device.type == "cpu" and key not in self.backup:
                # Detached: moving a module to the GPU exchanges the data of the same Parameter.
                self.backup[key] = _Backup(parameter.detach(), False)
        return super().load(*args, **kwargs)

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        self.weight_inplace_update = False
        return super().patch_weight_to_device(key, device_to, False, *args, **kwargs)

    # ---- hooks

    def get_combined_hook_patches(self, hooks: Any) -> dict[str, list[Any]]:
        return dict(hooks.combined) if isinstance(hooks, RemoteHooks) else super().get_combined_hook_patches(hooks)

    def _make_private(self, key: str) -> None:
        weight = comfy.utils.get_attr(self.model, key)
        if weight.device.type == "cpu" and key not in self._hook_views:
            self._hook_views[key] = weight
            comfy.utils.set_attr_param(self.model, key, weight.clone())

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: dict[str, Any], key: str, *args: Any, **kwargs: Any
    ) -> Any:
        if key in combined_patches:
            self._make_private(key)
        return super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    def patch_cached_hook_weights(self, cached_weights: dict[str, Any], key: str, *args: Any, **kwargs: Any) -> Any:
        self._make_private(key)
        return super().patch_cached_hook_weights(cached_weights, key, *args, **kwargs)

    def unpatch_hooks(self, *args: Any, **kwargs: Any) -> Any:
        super().unpatch_hooks(*args, **kwargs)
        for key in [key for key in self._hook_views if key not in self.hook_backup]:
            comfy.utils.set_attr_param(self.model, key, self._hook_views.pop(key))
