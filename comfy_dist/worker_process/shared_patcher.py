"""ComfyUI's ModelPatcher for weights that other processes share.

Parameters are views on shared memory. ComfyUI patches some weights by replacing the parameter, which is fine: only what
is patched becomes private, and goes when it is unpatched. But it writes hook LoRAs into the parameter itself, and copies
parameters back from the GPU on unloading. Here a parameter is made private before a hook writes to it, and every
parameter's view is its own backup, so that unloading puts the view back.

Worked out on ComfyUI 0.8 to 0.33 without dynamic VRAM, which a worker never has: only ComfyUI's main program turns it on.
"""

from __future__ import annotations

import collections
import math
import weakref
from collections.abc import Callable

import comfy.model_patcher
import comfy.utils
from torch import Tensor

from rayltx.comfy_dist.comfy_types import HookGroup, KeyPatches
from rayltx.comfy_dist.marks import HOOK_VIEWS, HOOKS_AT_USE, PATCH_DTYPE, STREAMING
from rayltx.comfy_dist.wire import HookPatches
from rayltx.comfy_dist.worker_process.block_streaming import BlockStreaming, reserved_bytes
from rayltx.comfy_dist.worker_process.patches_at_use import is_quantised_weight, set_patches_at_use
from rayltx.devices import KINDS, DeviceKind

_Backup = collections.namedtuple("_Backup", ["weight", "inplace_update"])


class RemoteHooks:
    """Hooks as the ComfyUI process combined them for this step, known by their key.

    Stands in for ComfyUI's HookGroup, whose strengths change with the sampling step there.
    """

    def __init__(self, hooks: HookPatches) -> None:
        self.key, self.patches = hooks.key, hooks.patches

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteHooks) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


class SharedWeightPatcher(comfy.model_patcher.ModelPatcher):
    """Never writes to a parameter that it was given."""

    @property
    def _hook_views(self) -> dict[str, Tensor]:
        """The views in whose place hooks have a private copy. Kept on the model, which clones of the patcher share."""
        return self.model.__dict__.setdefault(HOOK_VIEWS, {})

    # Set by the worker before it loads: bytes of weights on the device at most; 0: as many as fit.
    weight_budget = 0
    # What the worker wants to be told when ComfyUI takes weights off the device for something else.
    before_unloading: weakref.WeakMethod[Callable[[], None]] | None = None

    def _tell_of_unloading(self) -> None:
        told = None if self.before_unloading is None else self.before_unloading()
        if told is not None:
            told()

    def load(
        self, device_to: object = None, lowvram_model_memory: float = 0, force_patch_weights: bool = False,
        full_load: bool = False, **kwargs: object,
    ) -> None:  # fmt: skip
        for key, parameter in self.model.named_parameters():
            if parameter.device.type == "cpu" and key not in self.backup:
                # Detached: moving a module to the GPU exchanges the data of the same Parameter.
                self.backup[key] = _Backup(parameter.detach(), False)
        if 0 < self.weight_budget < self.model_size():
            full_load = False
            lowvram_model_memory = min(lowvram_model_memory or math.inf, self.weight_budget)
        held = self.streaming_bytes()
        self.end_streaming()
        in_part = not full_load and 0 < lowvram_model_memory < self.model_size()
        if in_part and not self.weight_budget:
            lowvram_model_memory += held  # which did not look free when this was measured
        reserved = self._reserved_for_streaming(lowvram_model_memory) if in_part else 0
        super().load(device_to, lowvram_model_memory - reserved, force_patch_weights, full_load, **kwargs)
        self._set_patches_at_use()
        if reserved:
            self._stream_blocks()

    # ---- streaming what is on the host

    @property
    def _device_kind(self) -> DeviceKind | None:
        kind = KINDS.get(self.load_device.type)
        return kind if kind is not None and kind.copies_by_itself() else None

    def _reserved_for_streaming(self, budget: float) -> int:
        """Bytes of a budget of weights that are kept for those of the next block; 0: too few, or a device without streams."""
        if self._device_kind is None:
            return 0
        reserved = reserved_bytes(self.model.diffusion_model.transformer_blocks)
        return reserved if 2 * reserved <= budget else 0

    def _stream_blocks(self) -> None:
        kind, blocks = self._device_kind, self.model.diffusion_model.transformer_blocks
        assert kind is not None
        self.model.__dict__[STREAMING] = BlockStreaming(blocks, self.load_device, kind)

    def streaming_bytes(self) -> int:
        """Of the device's memory, for the weights of the next block."""
        streaming = self.model.__dict__.get(STREAMING)
        return 0 if streaming is None else streaming.num_bytes

    def end_streaming(self) -> None:
        """Before weights move: what is on its way is for where they are now."""
        streaming = self.model.__dict__.pop(STREAMING, None)
        if streaming is not None:
            streaming.end()

    def patch_weight_to_device(
        self, key: str, device_to: object = None, inplace_update: bool = False, *args: object, **kwargs: object
    ) -> object:
        self.weight_inplace_update = False
        if self._is_quantised(key) and not kwargs.get("return_weight") and not args:
            return None  # patched where it is used
        return super().patch_weight_to_device(key, device_to, False, *args, **kwargs)

    # ---- quantised layers: patched where they are used

    def _is_quantised(self, key: str) -> bool:
        owner, _, name = key.rpartition(".")
        return is_quantised_weight(comfy.utils.get_attr(self.model, owner) if owner else self.model, name)

    def _set_patches_at_use(self) -> None:
        """Give each quantised layer the patches that count now.

        After whatever ComfyUI may have done to the layers' functions: it clears, keeps and adds to them as layers move.
        """
        dtype = self.model.__dict__.get(PATCH_DTYPE, "default")
        for name, layer in self.model.named_modules():
            if not is_quantised_weight(layer, "weight"):
                continue
            key = f"{name}.weight"
            sources = [patches[key] for patches in (self.patches, self._hooks_at_use) if key in patches]
            on_device = layer.weight.device.type != "cpu"
            set_patches_at_use(layer, key, sources, dtype, layer.weight.device if on_device else self.load_device)

    @property
    def _hooks_at_use(self) -> KeyPatches:
        """The patches of the current hooks. Kept on the model, as `_hook_views`."""
        return self.model.__dict__.setdefault(HOOKS_AT_USE, {})

    def partially_unload(self, *args: object, **kwargs: object) -> object:
        self._tell_of_unloading()
        self.end_streaming()  # until the next load ComfyUI brings each layer itself: memory is wanted now
        freed = super().partially_unload(*args, **kwargs)
        self._set_patches_at_use()
        return freed

    def unpatch_model(self, device_to: object = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self._tell_of_unloading()
            self.end_streaming()
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for layer in self.model.modules():
                if is_quantised_weight(layer, "weight"):
                    set_patches_at_use(layer, "", [], "", self.load_device)

    def model_state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Without what quantised layers add when they are saved: to apply hooks, ComfyUI looks for it on the layers."""
        known = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
        return {name: tensor for name, tensor in super().model_state_dict(*args, **kwargs).items() if name in known}

    # ---- hooks

    def get_combined_hook_patches(self, hooks: HookGroup) -> KeyPatches:
        return dict(hooks.patches) if isinstance(hooks, RemoteHooks) else super().get_combined_hook_patches(hooks)

    def _make_private(self, key: str) -> None:
        weight = comfy.utils.get_attr(self.model, key)
        if weight.device.type == "cpu" and key not in self._hook_views:
            self._hook_views[key] = weight
            comfy.utils.set_attr_param(self.model, key, weight.clone())

    def patch_hook_weight_to_device(
        self, hooks: HookGroup, combined_patches: KeyPatches, key: str, *args: object, **kwargs: object
    ) -> object:
        if self._is_quantised(key):
            return None  # see `patch_hooks`
        if key in combined_patches:
            self._make_private(key)
        return super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    def patch_cached_hook_weights(
        self, cached_weights: dict[str, object], key: str, *args: object, **kwargs: object
    ) -> object:
        self._make_private(key)
        return super().patch_cached_hook_weights(cached_weights, key, *args, **kwargs)

    def patch_hooks(self, hooks: HookGroup) -> None:
        super().patch_hooks(hooks)
        self._hooks_at_use.clear()
        if hooks is not None:
            self._hooks_at_use.update(self.get_combined_hook_patches(hooks))
        self._set_patches_at_use()

    def unpatch_hooks(self, *args: object, **kwargs: object) -> None:
        if self._hooks_at_use:
            self._hooks_at_use.clear()
            self._set_patches_at_use()
        super().unpatch_hooks(*args, **kwargs)
        for key in [key for key in self._hook_views if key not in self.hook_backup]:
            comfy.utils.set_attr_param(self.model, key, self._hook_views.pop(key))
