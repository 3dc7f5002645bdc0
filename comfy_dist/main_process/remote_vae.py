"""The VAE that ComfyUI sees: a real one of its class, without weights, whose model is run by the workers.

What a VAE does around its model is ComfyUI's own and runs in its process: cropping, tiles with their feathering, batches by
what memory allows, tiles where it ran out. The model's calls go to the workers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_types import VAE, VAEModel
from rayltx.comfy_dist.main_process.absent_weights import drop_values
from rayltx.comfy_dist.main_process.auxiliary_link import KeptAuxiliary, LivingLinks, load_on_workers
from rayltx.comfy_dist.main_process.auxiliary_memory import AuxiliaryMemory, AuxiliaryStandIn
from rayltx.comfy_dist.main_process.detection import check_names, check_version, header_of, without_dynamic_vram
from rayltx.comfy_dist.main_process.vae_link import VAELink, refuse_to_save
from rayltx.comfy_dist.marks import LINK
from rayltx.comfy_dist.vae_building import build_vae
from rayltx.comfy_dist.vae_host import VAE_HOST, VAESpec
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.diffusion_models.lightricks.vae_checkpoint import open_vae
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.weight_sharing import Progress
from rayltx.errors import CheckpointError, UnsupportedError, listed


@functools.cache
def _remote_class(model_class: Any) -> Any:
    """The class of a VAE's model, run by the workers."""

    names = list(inspect.signature(model_class.encode).parameters)[2:]

    class RemoteVAEModel(model_class):
        def decode(self, x: Tensor, output_buffer: Tensor | None = None, **options: Any) -> Tensor:
            return getattr(self, LINK).decode(self, x, output_buffer, options)

        def encode(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
            options = {**dict(zip(names, args)), **options}
            options.pop("device", None)  # the workers have their own
            return getattr(self, LINK).encode(self, x, options)

    RemoteVAEModel.__name__ = RemoteVAEModel.__qualname__ = model_class.__name__
    return RemoteVAEModel


class RemoteVAE(comfy.sd.VAE):
    """ComfyUI's VAE, whose tiles are shared by the workers."""

    def decode(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._shared():
            return super().decode(*args, **kwargs)

    def decode_tiled(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._shared():
            return super().decode_tiled(*args, **kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._shared():
            return super().encode(*args, **kwargs)

    def encode_tiled(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._shared():
            return super().encode_tiled(*args, **kwargs)

    def get_sd(self) -> dict[str, Tensor]:
        refuse_to_save()

    @contextlib.contextmanager
    def _shared(self) -> Any:
        link: VAELink = getattr(self.first_stage_model, LINK)
        with torch.inference_mode():
            link.ensure_loaded()
            with link.tiles_shared():
                yield


_living = LivingLinks()


def get_vae(
    path: str, part: str, request: ClusterRequest, kept: KeptAuxiliary | None = None, progress: Progress | None = None
) -> VAE:
    """A VAE of a file on the workers, which is loaded if it is not. kept: what the node has of its last run.

    part: see `open_vae`. Raises CheckpointError and UnsupportedError before any worker is asked.
    """
    checkpoint = open_vae(path, part)
    vae = _without_weights(checkpoint)

    def load() -> VAELink:
        spec, name = VAESpec(checkpoint.metadata, vae.vae_dtype), f"VAE ({type(vae.first_stage_model).__name__})"
        return VAELink(*load_on_workers(checkpoint, spec, VAE_HOST, vae.vae_dtype, request, name, progress), vae)

    link = _living.get(checkpoint, request, load, kept)
    _connect(vae, link)
    if kept is not None:
        kept.model = vae
    return vae


def _without_weights(checkpoint: Checkpoint) -> VAE:
    """ComfyUI's VAE of a file, whose model has no weights."""
    check_version()
    check_names()
    tensors = header_of(checkpoint)
    try:
        with torch.inference_mode(), without_dynamic_vram():
            vae = build_vae(tensors, checkpoint.metadata)
    except RuntimeError as error:  # what torch says of parameters with other shapes
        raise CheckpointError(
            f"{checkpoint.path}: its VAE has other tensors than its `config` metadata say, or none of that: {error}"
        ) from error
    model: VAEModel = vae.first_stage_model
    if model is None or not type(model).__module__.startswith("comfy.ldm.lightricks."):
        found = "no VAE that it knows" if model is None else type(model).__name__
        raise UnsupportedError(
            f"{checkpoint.path}: ComfyUI takes it for {found}, not for a VAE of an LTX model; it needs a newer ComfyUI, or "
            "ComfyUI's own Load VAE"
        )
    absent = [name for name, parameter in model.named_parameters() if name not in _loaded_names(tensors)]
    if absent:
        raise CheckpointError(
            f"{checkpoint.path}: {len(absent)} parameters of the VAE are missing ({listed(absent, most=3)}); download it again"
        )
    return vae


def _connect(vae: VAE, link: VAELink) -> None:
    """Have a VAE without weights run by the workers."""
    model = vae.first_stage_model
    model_class: Any = type(model)
    model.__class__ = _remote_class(model_class)
    object.__setattr__(model, LINK, link)
    drop_values(model)
    vae.__class__ = RemoteVAE
    vae.patcher = AuxiliaryStandIn(
        AuxiliaryMemory(link), vae.device, model, comfy.model_management.vae_offload_device()
    )


def _loaded_names(tensors: dict[str, Tensor]) -> set[str]:
    """Under what names ComfyUI takes a file's tensors."""
    return {
        name.replace("audio_vae.", "autoencoder.", 1) if name.startswith("audio_vae.") else name for name in tensors
    }
