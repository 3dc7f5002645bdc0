"""A model of ComfyUI's next to the transformer on one worker, on weights that all workers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import comfy.model_management as management
import torch
from torch import Tensor, nn

from rayltx.comfy_dist.auxiliary_host import AuxiliaryHost
from rayltx.comfy_dist.worker_process.shared_patcher import SharedWeightPatcher
from rayltx.distributed_worker.freed_memory import give_back_freed_memory
from rayltx.distributed_worker.messages import INLINE_BYTES

_ALIGNMENT = 64  # bytes; of torch's memory


class WholePatcher(SharedWeightPatcher):
    """Without blocks to stream: such a model is on the device as a whole while it runs."""

    def _reserved_for_streaming(self, budget: float) -> int:
        return 0


class AuxiliaryModel(AuxiliaryHost, ABC):
    """What it can be asked is described in `AuxiliaryHost`."""

    def __init__(self) -> None:
        self._given: dict[str, Tensor] = {}
        self._patcher: WholePatcher | None = None

    @abstractmethod
    def _build(self) -> nn.Module:
        """The model, on the tensors of `_given`."""

    @abstractmethod
    def _device(self) -> torch.device:
        """That it runs on, when it has been built."""

    # ---- loading

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        self._given.update({name: _aligned(tensor) for name, tensor in tensors.items()})

    def finish_loading(self) -> None:
        with torch.inference_mode():
            model = self._build()
        absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        assert not absent, f"parameters without weights: {absent[:5]}"
        model.requires_grad_(False)
        self._patcher = WholePatcher(model, load_device=self._device(), offload_device=torch.device("cpu"))

    def parameters(self) -> Mapping[str, Tensor]:
        return self._given

    def module(self, name: str) -> nn.Module:
        assert self._patcher is not None
        return self._patcher.model.get_submodule(name)

    def close(self) -> None:
        self.unload()

    # ---- memory

    def rest(self) -> None:
        give_back_freed_memory()
        management.soft_empty_cache()  # for what shares the card

    def unload(self) -> None:
        with torch.inference_mode():
            for loaded in list(management.current_loaded_models):
                if self._patcher is not None and loaded.model is self._patcher:
                    loaded.model_unload()
                    management.current_loaded_models.remove(loaded)
            management.soft_empty_cache()

    def free_bytes(self) -> int:
        return int(management.get_free_memory(self._device()))


def _aligned(tensor: Tensor) -> Tensor:
    """A small tensor as torch allocates one: on the CPU the last bits of a product can differ with where its numbers lie."""
    is_small = tensor.nbytes < INLINE_BYTES
    return tensor.clone() if is_small and tensor.data_ptr() % _ALIGNMENT else tensor
