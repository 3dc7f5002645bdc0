"""RAY_ACTORS and RAY_GUIDER: what Raylight's nodes hand to each other, on top of a twin."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.utils

from rayltx.comfy_dist.comfy_types import VAE, Guider, Model, Upsampler
from rayltx.comfy_dist.main_process.auxiliary_link import KeptAuxiliary
from rayltx.comfy_dist.main_process.loaded_models import Kept, loaded_models
from rayltx.comfy_dist.main_process.lora_files import LoraFile
from rayltx.comfy_dist.main_process.loras import with_loras
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.remote_upsampler import get_upsampler
from rayltx.comfy_dist.main_process.remote_vae import get_vae
from rayltx.comfy_dist.main_process.twin import LoadOptions, TwinPatcher
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.weight_sharing import Progress
from rayltx.errors import InputError

_PROGRESS_STEPS = 100
_KEPT_VAE, _KEPT_UPSAMPLER = "_rayltx_kept_vae", "_rayltx_kept_upsampler"  # of a node


@dataclass(frozen=True)
class RayActors:
    """A model on the workers."""

    model: TwinPatcher

    def with_model(self, model: Model) -> RayActors:
        return dataclasses.replace(self, model=model)


@dataclass(frozen=True)
class RayGuider:
    """ComfyUI's GUIDER, and whose model it guides."""

    guider: Guider
    actors: RayActors


def kept_by(node: object) -> Kept:
    """What a loader node keeps, on the node."""
    return node.__dict__.setdefault("_rayltx_kept", Kept())


def request_of(ray_actors: RayActors | None, placement: Placement | None = None) -> ClusterRequest:
    """The workers of a RAY_ACTORS, or of a RAY_ACTORS_INIT; else those that run. Raises InputError if none do."""
    if ray_actors is not None:
        return ray_actors.model.placement.request
    if placement is not None:
        return placement.request
    current = Cluster.current()
    if current is None or not current.is_alive():
        raise InputError(
            "no workers run that could take it: connect ray_actors with a Ray loader, or ray_actors_init with Ray Init Actor"
        )
    return current.request


def load_vae(path: str, part: str, request: ClusterRequest, node: object) -> VAE:
    """Load a VAE on the workers. Shows progress, and can be cancelled there. part: see `open_vae`. node: keeps it."""
    kept = node.__dict__.setdefault(_KEPT_VAE, KeptAuxiliary())
    return get_vae(path, part, request, kept, _shown_progress())


def load_upsampler(path: str, request: ClusterRequest, node: object) -> Upsampler:
    """Load an upsampler of latents on the workers, as `load_vae` does a VAE."""
    kept = node.__dict__.setdefault(_KEPT_UPSAMPLER, KeptAuxiliary())
    return get_upsampler(path, request, kept, _shown_progress())


def let_go_of_vae(node: object) -> None:
    """A node has none any more."""
    node.__dict__.pop(_KEPT_VAE, None)


def _shown_progress() -> Progress:
    """On the node that runs."""
    bar = comfy.utils.ProgressBar(_PROGRESS_STEPS)

    def progress(done: int, total: int) -> None:
        bar.update_absolute(_PROGRESS_STEPS * done // total, _PROGRESS_STEPS)

    return progress


def load_actors(
    path: str, placement: Placement, loras: Sequence[LoraFile], max_vram_gb: float, kept: Kept, **options: str
) -> RayActors:
    """Load a checkpoint on the workers, with LoRAs. Shows progress, and can be cancelled there.

    kept: what the loader node has of its last run. max_vram_gb: GiB of weights on a device at most; 0: as many as fit.
    options: the fields of `LoadOptions`.
    """
    placement = dataclasses.replace(placement, weight_budget=int(max_vram_gb * 2**30))
    progress = _shown_progress()
    model = loaded_models.get(path, placement, LoadOptions(**options), kept, progress)
    return RayActors(with_loras(model, loras))
