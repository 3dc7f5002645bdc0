"""The VAE that ComfyUI sees: a real one of its class, without weights, whose model is run by the workers.

What a VAE does around its model is ComfyUI's own and runs in its process: cropping, tiles with their feathering, batches by
what memory allows, tiles where it ran out. The model's calls go to the workers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import time
import weakref
from dataclasses import dataclass
from typing import Any, NoReturn

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from rayltx.comfy_dist.comfy_types import VAE, VAEModel
from rayltx.comfy_dist.main_process.absent_weights import mark_absent
from rayltx.comfy_dist.main_process.detection import check_names, check_version, header_of, without_dynamic_vram
from rayltx.comfy_dist.main_process.loaded_models import FileState
from rayltx.comfy_dist.main_process.other_devices import OtherDevices, WorkerPatcher, devices_elsewhere
from rayltx.comfy_dist.main_process.releasing import release_with, wait_for_releases
from rayltx.comfy_dist.main_process.vae_link import VAELink, refuse_to_save
from rayltx.comfy_dist.main_process.worker_link import raise_if_cancelled
from rayltx.comfy_dist.marks import LINK
from rayltx.comfy_dist.vae_building import build_vae
from rayltx.comfy_dist.vae_host import VAE_HOST, VAEHost, VAESpec
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.diffusion_models.lightricks.vae_checkpoint import open_vae
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.weight_sharing import Progress
from rayltx.distributed_worker.worker_calls import ask
from rayltx.errors import CheckpointError, UnsupportedError, listed

logger = logging.getLogger(__name__)


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


class VAEMemory:
    """What the workers hold of one VAE on devices that this process sees, too."""

    def __init__(self, link: VAELink) -> None:
        self._link = link
        self.loaded = False
        self._other_devices = OtherDevices(self)

    def __deepcopy__(self, memo: object) -> VAEMemory:
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
        """They return when the VAE is used again. All workers let go: they are used together."""
        if self.loaded and self._link.cluster.has_workers():
            self.loaded = False
            self._link.remote.call(ask(VAEHost.unload), "unloading")

    def free_bytes(self) -> int:
        """Of the device that has least."""
        self._link.ensure_loaded()
        return min(self._link.remote.call(ask(VAEHost.free_bytes), "measuring").values())


class VAEStandIn(WorkerPatcher):
    """Loads as nothing, and stands in ComfyUI's list of loaded models for the workers' memory."""

    _memory: VAEMemory

    def clone(self, *args: object, **kwargs: object) -> VAEStandIn:
        clone = VAEStandIn(self._memory, self.load_device, self.model, self.offload_device)
        clone.patches = {key: [*patches] for key, patches in self.patches.items()}
        clone.object_patches = dict(self.object_patches)
        return clone

    def deepclone_multigpu(self, *args: object, **kwargs: object) -> NoReturn:
        raise UnsupportedError("this VAE is on all Ray workers already: remove the node that puts it on another GPU")

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self._memory.loaded else self.offload_device

    def lowvram_patch_counter(self) -> int:
        return 0

    def model_mmap_residency(self, free: bool = False) -> tuple[int, int]:
        return 0, 0

    def partially_load(self, *args: object, **kwargs: object) -> int:
        if self.patches or self.object_patches:
            raise UnsupportedError(
                "a node has patched this VAE, which is with the Ray workers: it would have no effect; use ComfyUI's own Load VAE "
                "for this graph"
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


@dataclass
class KeptVAE:
    """The VAE that a node had at its last run. It is the node's own, so it goes when ComfyUI forgets the node."""

    vae: VAE = None


# The workers' by what was loaded: the file, and the tensors of it. Each node has a VAE of its own on them, as in ComfyUI, where
# nodes set things on a VAE's model.
_living: weakref.WeakValueDictionary[tuple[FileState, tuple[str, ...]], VAELink] = weakref.WeakValueDictionary()


def get_vae(
    path: str, part: str, request: ClusterRequest, kept: KeptVAE | None = None, progress: Progress | None = None
) -> VAE:
    """A VAE of a file on the workers, which is loaded if it is not. kept: what the node has of its last run.

    part: see `open_vae`. Raises CheckpointError and UnsupportedError before any worker is asked.
    """
    checkpoint = open_vae(path, part)
    source = FileState.of(path), tuple(checkpoint.tensors)
    vae = _without_weights(checkpoint)
    link = _living.get(source)
    if kept is not None:
        kept.vae = None
    if link is None:
        wait_for_releases()
        link = _load(checkpoint, vae, request, progress)
        _living[source] = link
    else:
        Cluster.start(request)
        link.ensure_loaded()
    _connect(vae, link)
    if kept is not None:
        kept.vae = vae
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


def _load(checkpoint: Checkpoint, vae: VAE, request: ClusterRequest, progress: Progress | None) -> VAELink:
    """Load a file's VAE on the workers, which are started if they do not run."""
    dtypes = {
        name: vae.vae_dtype
        for name, info in checkpoint.tensors.items()
        if info.dtype.is_floating_point and info.dtype != vae.vae_dtype
    }
    started = time.monotonic()
    cluster = Cluster.start(request)
    with cluster.group.polling(raise_if_cancelled):
        spec = VAESpec(checkpoint.metadata, vae.vae_dtype)
        remote = cluster.load(checkpoint, spec, VAE_HOST, dtypes, progress, keeps_host_copy=True)
    logger.info(
        "%s, VAE (%s): %.2f GiB on %d workers in %.1f s", os.path.basename(checkpoint.path),
        type(vae.first_stage_model).__name__, remote.source.weight_bytes / 2**30, request.workers,
        time.monotonic() - started,
    )  # fmt: skip
    link = VAELink(cluster, remote, vae)
    release_with(link, link.held)
    return link


def _connect(vae: VAE, link: VAELink) -> None:
    """Have a VAE without weights run by the workers."""
    model = vae.first_stage_model
    model_class: Any = type(model)
    model.__class__ = _remote_class(model_class)
    object.__setattr__(model, LINK, link)
    _drop_values(model)
    mark_absent(model)
    vae.__class__ = RemoteVAE
    vae.patcher = VAEStandIn(VAEMemory(link), vae.device, model, comfy.model_management.vae_offload_device())


def _drop_values(model: nn.Module) -> None:
    """Also of small parameters, which were read: those that count are the workers'. Buffers are for nodes that use them here."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


def _loaded_names(tensors: dict[str, Tensor]) -> set[str]:
    """Under what names ComfyUI takes a file's tensors."""
    return {
        name.replace("audio_vae.", "autoencoder.", 1) if name.startswith("audio_vae.") else name for name in tensors
    }
