"""The upsampler of latents that ComfyUI sees: a real one of its class, without weights, which a worker runs."""

from __future__ import annotations

import functools
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_types import Upsampler, UpsamplerModel
from rayltx.comfy_dist.main_process.absent_weights import drop_values
from rayltx.comfy_dist.main_process.auxiliary_link import (
    AuxiliaryLink,
    KeptAuxiliary,
    LivingLinks,
    as_comfyui_says_it,
    load_on_workers,
)
from rayltx.comfy_dist.main_process.auxiliary_memory import AuxiliaryMemory, AuxiliaryStandIn
from rayltx.comfy_dist.main_process.detection import check_names, check_version, header_of
from rayltx.comfy_dist.marks import LINK
from rayltx.comfy_dist.upsampler_building import build_upsampler
from rayltx.comfy_dist.upsampler_host import UPSAMPLER_HOST, UpsamplerHost, UpsamplerSpec
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.diffusion_models.lightricks.upsampler_checkpoint import open_upsampler
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.weight_sharing import Progress
from rayltx.distributed_worker.worker_calls import ask
from rayltx.errors import CheckpointError, first_line

_DTYPES = [torch.bfloat16, torch.float32]  # that ComfyUI's loader chooses from

_living = LivingLinks()


class UpsamplerLink(AuxiliaryLink):
    """Of one upsampler."""

    kind = "latent upsampler"

    def upsample(self, latent: Tensor) -> Tensor:
        """What the model gives, where the latent is."""
        self.ensure_loaded()
        with as_comfyui_says_it("upsampling"):
            found = self._on_one(ask(UpsamplerHost.upsample, latent), "upsampling").to(latent.device)
        self._rest()
        return found

    def unload(self) -> None:
        """Free the devices' memory. Nothing is waited for."""
        self.remote.tell(ask(UpsamplerHost.unload))


@functools.cache
def _remote_class(model_class: Any) -> Any:
    """The class of an upsampler that a worker runs."""

    class RemoteUpsampler(model_class):
        def forward(self, latent: Tensor) -> Tensor:
            return getattr(self, LINK).upsample(latent)

        def to(self, *args: Any, **kwargs: Any) -> UpsamplerModel:  # as ComfyUI before 0.29 brings it to a device
            return self

        def cpu(self) -> UpsamplerModel:  # and takes it off
            getattr(self, LINK).unload()
            return self

    RemoteUpsampler.__name__ = RemoteUpsampler.__qualname__ = model_class.__name__
    return RemoteUpsampler


def get_upsampler(
    path: str, request: ClusterRequest, kept: KeptAuxiliary | None = None, progress: Progress | None = None
) -> Upsampler:
    """An upsampler of a file on the workers, which is loaded if it is not. kept: what the node has of its last run.

    Raises CheckpointError before any worker is asked.
    """
    checkpoint = open_upsampler(path)
    dtype: torch.dtype = management.vae_dtype(allowed_dtypes=_DTYPES)
    model = _without_weights(checkpoint, dtype)

    def load() -> UpsamplerLink:
        spec = UpsamplerSpec(checkpoint.config, dtype)
        return UpsamplerLink(
            *load_on_workers(checkpoint, spec, UPSAMPLER_HOST, dtype, request, "latent upsampler", progress)
        )

    link = _living.get(checkpoint, request, load, kept)
    upsampler = _connect(model, link)
    if kept is not None:
        kept.model = upsampler
    return upsampler


def _without_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> UpsamplerModel:
    check_version()
    check_names()
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in header_of(checkpoint).items()
    }
    try:
        with torch.inference_mode():
            return build_upsampler(tensors, checkpoint.config, dtype)
    except (RuntimeError, TypeError, ValueError) as error:  # what the model's class makes of another file's config
        raise CheckpointError(
            f"{checkpoint.path}: its tensors are not those of the upsampler that this ComfyUI makes of its `config` metadata "
            f"({first_line(error)}); it needs a newer ComfyUI, or is damaged: download it again then"
        ) from error


def _connect(model: UpsamplerModel, link: UpsamplerLink) -> Upsampler:
    """Have an upsampler without weights run by the workers."""
    has_patcher = hasattr(model, "get_dtype")  # ComfyUI 0.29 and later put it into a ModelPatcher
    model_class: Any = type(model)
    model.__class__ = _remote_class(model_class)
    object.__setattr__(model, LINK, link)
    drop_values(model)
    if not has_patcher:
        return model
    return AuxiliaryStandIn(
        AuxiliaryMemory(link), management.get_torch_device(), model, management.unet_offload_device()
    )
