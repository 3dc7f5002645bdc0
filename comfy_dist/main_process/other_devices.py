"""Workers on cards that are not ComfyUI's own, in its list of loaded models.

A MODEL stands in that list for the card that it would run on. What else is loaded on one of the other workers' cards, such as
a VAE that a node has put there, finds nothing to push out otherwise, and runs out of memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol

import comfy.model_management as management
import comfy.model_patcher
import torch
from torch import nn

from rayltx.distributed_worker.cluster import Cluster


class Memory(Protocol):
    """Of one model on the workers' devices; see `DeviceMemory`."""

    def device_bytes(self, device: torch.device) -> int: ...
    def placed_bytes(self, device: torch.device) -> int: ...
    def unload_bytes(self, device: torch.device, num_bytes: int) -> int: ...
    def empty(self, device: torch.device) -> None: ...


class WorkerRayLTX(nn.Module):
    """What ComfyUI's log calls a worker's share of a model."""


class WorkerPatcher(comfy.model_patcher.ModelPatcher):
    """Stands for what a worker has on its card. ComfyUI can unload it, and does not load it."""

    def __init__(
        self,
        memory: Memory,
        device: torch.device,
        model: nn.Module | None = None,
        offload_device: torch.device | None = None,
    ) -> None:
        """model: that it stands for; None: a worker's share of any. offload_device: None is the CPU."""
        offload_device = offload_device or torch.device("cpu")
        super().__init__(model or WorkerRayLTX(), load_device=device, offload_device=offload_device)
        self._memory = memory

    def model_size(self) -> int:
        return self._memory.device_bytes(self.load_device)

    def loaded_size(self) -> int:
        return self._memory.placed_bytes(self.load_device)

    def current_loaded_device(self) -> torch.device:
        return self.load_device

    def partially_load(self, *args: object, **kwargs: object) -> int:
        return 0

    def partially_unload(self, device_to: object, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        return self._memory.unload_bytes(self.load_device, int(memory_to_free))

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        self._memory.empty(self.load_device)
        return self.model


def devices_elsewhere(cluster: Cluster) -> list[torch.device]:
    """Workers' devices, as this process numbers them, that are not the one that ComfyUI runs on."""
    request, own = cluster.request, management.get_torch_device()
    devices = [] if request.on_cpu else [torch.device(request.device, n) for n in range(request.kind.count())]
    return [device for device in devices if device != own and cluster.rank_on(device) is not None]


class OtherDevices:
    """The workers of one model on such cards."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._patchers: dict[torch.device, WorkerPatcher] = {}  # ComfyUI's list holds them weakly

    def list_on(self, devices: Iterable[torch.device]) -> None:
        """Have them in ComfyUI's list of loaded models, each once."""
        for device in devices:
            patcher = self._patchers.setdefault(device, WorkerPatcher(self._memory, device))
            if any(loaded.model is patcher for loaded in management.current_loaded_models):
                continue
            loaded = management.LoadedModel(patcher)
            # What ComfyUI sets when it loads a model: gone with the patcher, the entry is taken out of the list.
            loaded.real_model = weakref.ref(patcher.model)
            loaded.model_finalizer = weakref.finalize(patcher.model, management.cleanup_models)
            loaded.model_finalizer.atexit = False
            loaded.currently_used = False
            management.current_loaded_models.append(loaded)
