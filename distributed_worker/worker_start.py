"""What Ray is asked for, and the workers' processes in it."""

from __future__ import annotations

import os

import psutil

from rayltx.about import python_path
from rayltx.distributed_worker.driver.link import RayDriver
from rayltx.distributed_worker.driver.protocol import LOCAL, RaySettings
from rayltx.distributed_worker.gpu_pinning import without_async_allocator
from rayltx.distributed_worker.meeting import INTERFACE_VARIABLES
from rayltx.distributed_worker.object_store import object_store_bytes
from rayltx.distributed_worker.request import ClusterRequest

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_LOOPBACK = "lo"


def ray_settings(request: ClusterRequest) -> RaySettings:
    """Raises DeviceError for an object store that shared memory cannot hold."""
    is_local = request.address == LOCAL
    store_bytes = object_store_bytes(request.object_store_bytes, request.kept_shared_memory) if is_local else 0
    return RaySettings(request.address, request.namespace, store_bytes, request.dashboard)


def start_worker(
    driver: RayDriver, request: ClusterRequest, gpus: tuple[str, ...], rank: int, without_peer_to_peer: bool = False
) -> int:
    """Start the process of one rank. Returns its number at once, while it comes up.

    gpus: of each worker, as `ClusterRequest.gpus` says. without_peer_to_peer: keep GPUs from copying to each other's memory.
    """
    environment = {
        name: without_async_allocator(os.environ[name]) for name in _ALLOCATOR_VARIABLES if name in os.environ
    }
    environment["PYTHONPATH"] = python_path()
    if request.address == LOCAL:
        environment |= {name: os.environ.get(name, _LOOPBACK) for name in INTERFACE_VARIABLES}
    if without_peer_to_peer:
        environment.update(request.kind.peer_to_peer_off)
    resources: dict[str, float] = {"num_cpus": 0}
    if gpus:
        environment.update(request.kind.pinned_to(gpus[rank]))
        # Ray versions differ for num_gpus=0.
        for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR"):
            environment[f"RAY_EXPERIMENTAL_NOSET_{variable}"] = "1"
    elif not request.on_cpu:
        resources["num_gpus"] = 1  # another machine's cluster gives out its own GPUs
    threads = max(1, (psutil.cpu_count() or 1) // request.workers)
    shared_folder = str(driver.folder) if driver.shares_memory else ""
    arguments = (request.device, threads, shared_folder)
    return driver.start_worker(rank, request.workers, arguments, environment, resources)
