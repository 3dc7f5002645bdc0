"""What a machine cannot do, told by name before anything starts."""

from __future__ import annotations

import sys
from collections import Counter

import torch.distributed as dist

from rayltx.distributed_worker.driver.protocol import LOCAL
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import DeviceError


def check_machine(request: ClusterRequest) -> None:
    """Raises DeviceError for a system, a torch or GPUs that workers cannot run on."""
    if sys.platform == "win32":
        raise DeviceError(
            "RayLTX runs on Linux, and on Windows within WSL2: the torch for Windows itself has no NCCL, by which GPUs talk to "
            "each other; start ComfyUI in WSL2, or use ComfyUI's own loader"
        )
    gpus = request.gpus()
    if request.on_cpu:
        return
    if request.workers > 1 and not dist.is_backend_available(request.kind.collectives):
        raise DeviceError(
            f"{request.workers} workers: this torch has no {request.kind.collectives}, by which GPUs talk to each "
            "other; install a torch built for your GPUs, set GPU to 1, or set the device to cpu"
        )
    if request.address == LOCAL and request.workers > 1:
        _check_cards(request, gpus)


def _check_cards(request: ClusterRequest, gpus: tuple[str, ...]) -> None:
    shared = [gpu for gpu, count in Counter(gpus).items() if count > 1]
    if shared:
        raise DeviceError(
            f"{request.kind.visible_variable} names GPU {', '.join(shared)} twice: each worker needs its own; name each once"
        )
    chosen = request.gpu_names()
    slices = [f"{gpu} ({name})" for gpu, name in zip(gpus, chosen) if gpu.startswith("MIG-") or " MIG " in name]
    if slices:
        raise DeviceError(
            f"GPU {', '.join(slices)}: slices of a card (MIG) cannot talk to each other through NCCL; turn MIG off, or set GPU "
            "to 1"
        )


def differing_cards(request: ClusterRequest) -> str:
    """What it means that the workers' cards are not the same; "" where they are."""
    chosen = request.gpu_names()
    if len(set(chosen)) < 2:
        return ""
    names = ", ".join(chosen)
    return (
        f"the GPUs differ ({names}): each gets a share of the video by its speed, unless gpu_shares says otherwise; with "
        "cfg_degree or dp_degree above 1 groups of them get as many rows each, and the slowest group sets the pace"
    )
