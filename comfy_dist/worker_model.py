"""The host that the workers run for ComfyUI: its own model, sharded, on shared weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rayltx.comfy_dist.detection import ComfySpec
from rayltx.comfy_dist.forwarding import PatchState
from rayltx.comfy_dist.self_test import errors_by_case, tiny_model
from rayltx.diffusion_models.lightricks.comfyui_host import sharded
from rayltx.diffusion_models.lightricks.feed_forward import CHUNKS_OPTION
from rayltx.distributed_worker.freed_memory import give_back_freed_memory
from rayltx.distributed_worker.messages import Message, unpack
from rayltx.sequence_parallel.group import SequenceParallelGroup


class ComfyModel:
    """ComfyUI's LTX model on one rank. A `Host`."""

    def __init__(self, spec: ComfySpec, device: str) -> None:
        self._spec = spec
        self._given: dict[str, Tensor] = {}
        self._base: Any = None  # the patcher without patches; clones of it carry them
        self._patcher: Any = None
        self._loaded_for: Any = None
        self._hooks: dict[str, Any] = {}
        self._parts: dict[str, Any] = {}  # of transformer options that stay the same over many steps

    # ---- loading

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        self._given.update(tensors)

    def finish_loading(self) -> None:
        from rayltx.comfy_dist.loader import build_on

        with torch.inference_mode():
            self._base = self._patcher = build_on(dict(self._given), self._spec)

    def parameters(self) -> Mapping[str, Tensor]:
        """The shared bytes themselves, whatever has been patched since."""
        return self._given

    @property
    def diffusion_model(self) -> Any:
        return self._base.model.diffusion_model

    def module(self, name: str) -> Any:
        """What a name of the ComfyUI process's model means here."""
        return self.diffusion_model.get_submodule(name)

    # ---- calls

    def forward(self, group: SequenceParallelGroup, inputs: Mapping[str, Any]) -> Any:
        """One call of the model. Collective.

        inputs: `args` and `kwargs` of the model's `_forward`; `options`, the transformer options that change from step to
        step; `parts`, the key of those that do not (see `keep_part`); `hooks`, a key, or None; and what `_load` takes.
        Returns on rank 0 what the model returns, on the CPU; None elsewhere.
        """
        with torch.inference_mode():
            device = self._patcher.load_device
            self._load(inputs)
            hooks = None if inputs["hooks"] is None else self._hooks[inputs["hooks"]]
            if hooks != self._patcher.current_hooks:
                self._patcher.patch_hooks(hooks)
            options = {**self._parts[inputs["parts"]], **inputs["options"]}
            args, kwargs = _to_device((inputs["args"], inputs["kwargs"]), device)
            kwargs["transformer_options"] = _to_device(options, device)
            chunks = options.get(CHUNKS_OPTION, 1)
            with sharded(self.diffusion_model, group, chunks):
                out = self.diffusion_model._forward(*args, **kwargs)
            return _to_device(out, torch.device("cpu")) if group.rank == 0 else None

    def keep_part(self, message: Message) -> None:
        """Remember transformer options under a key: patches and the like, whose state lives on between steps."""
        key, part = unpack(message, known=self.module)
        self._parts = {key: part}  # one MODEL samples at a time

    def keep_hooks(self, message: Message) -> None:
        """Remember the combined weight patches of some hooks under a key."""
        from rayltx.comfy_dist.shared_patcher import RemoteHooks

        key, combined = unpack(message, private=False, known=self.module)
        self._hooks[key] = RemoteHooks(key, combined)

    def forget_hooks(self, key: str) -> None:
        """Hooks of this key do not come again."""
        self._hooks.pop(key, None)

    def drop_hooks(self) -> None:
        """Undo hooks, and forget them."""
        with torch.inference_mode():
            self._patcher.clean_hooks()
            self._hooks.clear()
            give_back_freed_memory()

    def set_patches(self, message: Message) -> None:
        """Take the patches of a MODEL. They are applied when the weights are next loaded."""
        with torch.inference_mode():
            state: PatchState = unpack(message, private=False, known=self.module)
            self._patcher.clean_hooks()
            self._hooks.clear()
            patcher = self._base.clone()
            state.apply_to(patcher)
            self._patcher = patcher
            self._loaded_for = None

    def _load(self, inputs: Mapping[str, Any]) -> None:
        """Put the weights on the device, as ComfyUI does before it samples; once a run, and when patches changed.

        inputs: `load`, which is another for another run; `latent_shape` and `world_size`, of what will be sampled by how
        many; `weight_budget`, bytes of weights at most, 0 for as many as fit.
        """
        budget = inputs["weight_budget"]
        key = inputs["load"], budget
        if key == self._loaded_for:
            return
        import comfy.model_management

        if budget != self._patcher.weight_budget and self._patcher.loaded_size() > 0:
            self.unload()  # ComfyUI would leave a model that is loaded as it is
        self._patcher.weight_budget = budget
        # The estimate is for the whole sequence; a rank holds its share.
        memory = self._patcher.model.memory_required(inputs["latent_shape"]) / inputs["world_size"]
        comfy.model_management.load_models_gpu([self._patcher], memory_required=memory, minimum_memory_required=memory)
        if self._loaded_for is None:
            give_back_freed_memory()  # of earlier patches
        self._loaded_for = key

    def end_run(self) -> None:
        """A sampling run is over: on the CPU, the allocator holds on to what its largest layers took."""
        if self._patcher.load_device.type == "cpu":
            give_back_freed_memory()

    def unload(self) -> None:
        """Free the device's memory. The weights stay in the host's, where all workers share them."""
        import comfy.model_management as management

        with torch.inference_mode():
            for loaded in list(management.current_loaded_models):
                if self._base is not None and loaded.model is not None and loaded.model.is_clone(self._base):
                    loaded.model_unload()
                    management.current_loaded_models.remove(loaded)
            management.soft_empty_cache()
            self._loaded_for = None

    def loaded_bytes(self) -> int:
        """What the weights take of the device's memory."""
        if self._patcher is None or self._patcher.load_device.type == "cpu":
            return 0
        return int(self._patcher.loaded_size())

    def placed_bytes(self) -> int:
        """What ComfyUI counts as loaded of the weights, on the CPU too; the rest is streamed when it is used."""
        return int(self._patcher.loaded_size())

    def preprocess_text_embeds(self, message: Message) -> Tensor:
        """The text connector of LTX-2 and later, which is part of the model. Not collective."""
        with torch.inference_mode():
            inputs, args, kwargs = unpack(message)
            self._load(inputs)
            device = self._patcher.load_device
            args, kwargs = _to_device((args, kwargs), device)
            return self.diffusion_model.preprocess_text_embeds(*args, **kwargs).cpu()

    def self_test(self, group: SequenceParallelGroup) -> dict[str, float | str]:
        """Errors of the seam on a tiny model of this class and configuration. Collective; rank 0's count."""
        device = self._base.load_device
        with torch.inference_mode():
            model = tiny_model(type(self.diffusion_model), self._base.model.model_config.unet_config, device)
        return errors_by_case(model, group, device)

    def close(self) -> None:
        """Before the model is forgotten: ComfyUI keeps loaded models in a list of its own."""
        self.unload()


def _to_device(obj: Any, device: torch.device) -> Any:
    """The same containers with their tensors on a device."""
    if isinstance(obj, Tensor):
        return obj.to(device)
    if isinstance(obj, dict):
        return {key: _to_device(value, device) for key, value in obj.items()}
    if type(obj) in (list, tuple):
        return type(obj)(_to_device(value, device) for value in obj)
    return obj
