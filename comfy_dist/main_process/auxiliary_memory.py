"""Models next to the transformer, such as a VAE, in ComfyUI's list of loaded models: what the workers hold of them."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn

from rayltx.comfy_dist.auxiliary_host import AuxiliaryHost
from rayltx.comfy_dist.main_process.auxiliary_link import AuxiliaryLink
from rayltx.comfy_dist.main_process.other_devices import OtherDevices, WorkerPatcher, devices_elsewhere
from rayltx.distributed_worker.worker_calls import ask
from rayltx.errors import UnsupportedError


class AuxiliaryMemory:
    """What the workers hold of one model on devices that this process sees, too."""

    def __init__(self, link: AuxiliaryLink) -> None:
        self._link = link
        self.kind = link.kind
        self.loaded = False
        self._other_devices = OtherDevices(self)

    def __deepcopy__(self, memo: object) -> AuxiliaryMemory:
        return self

    def begin_use(self) -> None:
        """The workers bring the weights to their devices when they are asked."""
        self.loaded = True
        self._other_devices.list_on(devices_elsewhere(self._link.cluster))

    def device_bytes(self, device: torch.device) -> int:
        return 0 if self._link.cluster.rank_on(device) is None else self._link.remote.source.weight_bytes

    def placed_bytes(self, device: torch.device) -> int:
        return self.device_bytes(device) if self.loaded else 0

    def unload_bytes(self, device: torch.device, num_bytes: int) -> int:
        before = self.placed_bytes(device)
        self.empty(device)
        return before

    def empty(self, device: torch.device) -> None:
        """They return when the model is used again. All workers let go: they are used together."""
        if self.loaded and self._link.cluster.has_workers():
            self.loaded = False
            self._link.remote.call(ask(AuxiliaryHost.unload), "unloading")

    def free_bytes(self) -> int:
        """Of the device that has least."""
        self._link.ensure_loaded()
        return min(self._link.remote.call(ask(AuxiliaryHost.free_bytes), "measuring").values())


class AuxiliaryStandIn(WorkerPatcher):
    """A model's patcher in ComfyUI: loads as nothing, and stands in its list of loaded models for the workers' memory."""

    _memory: AuxiliaryMemory

    def clone(self, *args: object, **kwargs: object) -> AuxiliaryStandIn:
        clone = AuxiliaryStandIn(self._memory, self.load_device, self.model, self.offload_device)
        clone.patches = {key: [*patches] for key, patches in self.patches.items()}
        clone.object_patches = dict(self.object_patches)
        return clone

    def deepclone_multigpu(self, *args: object, **kwargs: object) -> NoReturn:
        raise UnsupportedError(
            f"this {self._memory.kind} is on all Ray workers already: remove the node that puts it on another GPU"
        )

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self._memory.loaded else self.offload_device

    def lowvram_patch_counter(self) -> int:
        return 0

    def model_mmap_residency(self, free: bool = False) -> tuple[int, int]:
        return 0, 0

    def partially_load(self, *args: object, **kwargs: object) -> int:
        if self.patches or self.object_patches:
            raise UnsupportedError(
                f"a node has patched this {self._memory.kind}, which is with the Ray workers: it would have no effect; use "
                "ComfyUI's own loader for this graph"
            )
        self._memory.begin_use()
        return self.loaded_size()

    def get_free_memory(self, device: torch.device) -> float:
        return self._memory.free_bytes()

    def patch_model(self, *args: object, **kwargs: object) -> nn.Module:
        return self.model

    def unpatch_model(self, *args: object, **kwargs: object) -> None:
        pass

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        return super().detach() if unpatch_all else self.model
