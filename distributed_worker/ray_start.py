"""Starting Ray, and the workers' processes in it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import psutil
import ray

from rayltx.about import SEARCH_PATH
from rayltx.distributed_worker.gpu_pinning import without_async_allocator
from rayltx.distributed_worker.object_store import object_store_bytes
from rayltx.distributed_worker.request import LOCAL, ClusterRequest
from rayltx.distributed_worker.worker import Worker

logger = logging.getLogger(__name__)

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@dataclass(frozen=True)
class RayConnection:
    """This process's connection to Ray. A process has one."""

    store_bytes: int  # size of the object store
    is_ours: bool  # made here, so ended here

    def close(self) -> None:
        """End what was started here."""
        if self.is_ours:
            ray.shutdown()


def connect(request: ClusterRequest) -> RayConnection:
    """Start Ray on this machine, join the cluster at the request's address, or use the connection that there is.

    Raises DeviceError for an object store that shared memory cannot hold.
    """
    if ray.is_initialized():
        logger.info("using the Ray connection that this process already has")
        return RayConnection(_store_bytes_of_cluster(), is_ours=False)
    if request.address != LOCAL:
        ray.init(address=request.address, log_to_driver=False, logging_level=logging.ERROR, namespace=request.namespace)
        return RayConnection(_store_bytes_of_cluster(), is_ours=True)
    store_bytes = object_store_bytes(request.object_store_bytes, request.kept_shared_memory)
    host, _, port = request.dashboard.rpartition(":")
    dashboard = {"dashboard_host": host, "dashboard_port": int(port)} if host else {}
    ray.init(
        address=LOCAL,
        include_dashboard=bool(dashboard),
        **dashboard,
        num_cpus=max(psutil.cpu_count() or 1, request.workers),
        # Ray's own count of memory to give out leaves the store's size out, and refuses to start when little is left.
        # Nothing here is given out by it.
        _memory=psutil.virtual_memory().total,
        num_gpus=0,  # GPUs are given out here, by what each worker's environment lets it see
        object_store_memory=store_bytes,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace=request.namespace,
    )
    return RayConnection(store_bytes, is_ours=True)


def _store_bytes_of_cluster() -> int:
    return int(ray.cluster_resources().get("object_store_memory", 0))


def start_worker(
    request: ClusterRequest, gpus: tuple[str, ...], rank: int, without_peer_to_peer: bool = False
) -> ray.actor.ActorHandle:
    """Start the process of one rank. Returns at once, while it comes up.

    gpus: of each worker, as `ClusterRequest.gpus` says. without_peer_to_peer: keep GPUs from copying to each other's memory.
    """
    environment = {
        name: without_async_allocator(os.environ[name]) for name in _ALLOCATOR_VARIABLES if name in os.environ
    }
    # The one folder that makes `rayltx` importable, and nothing else of this repository; none if a wheel is installed.
    search_path = [*SEARCH_PATH, os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
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
    actor_class = ray.remote(**resources, max_restarts=0, runtime_env={"env_vars": environment})(Worker)
    return actor_class.remote(request.device, threads)
