"""From command-line options to a cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rayltx.devices import CPU, automatic, kind_of
from rayltx.distributed_worker.driver.protocol import LOCAL
from rayltx.distributed_worker.gpu_pinning import parse_gpu_indices, parse_shares
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import DeviceError, ParallelConfigError
from rayltx.sequence_parallel.partition import ParallelConfig


@dataclass(frozen=True)
class ClusterOptions:
    workers: int
    ulysses: int
    ring: int
    cfg_degree: int
    shares: str
    device: str
    gpus: str
    address: str
    object_store_gb: float

    def resolve(self) -> tuple[ClusterRequest, ParallelConfig]:
        """Raises DeviceError and ParallelConfigError for what cannot be, before anything is started."""
        indices = parse_gpu_indices(self.gpus)
        device = self.device
        if device == "auto":
            device = automatic()
        if self.workers < 0:
            raise ParallelConfigError(f"workers={self.workers} must be at least 1; 0 is one for each GPU")
        if device != CPU and self.address == LOCAL and not kind_of(device).count():
            raise DeviceError(
                f"there is no {device} device that torch can use here; mend the driver, or use --device cpu"
            )
        if self.object_store_gb < 0:
            raise DeviceError(f"object-store-gb={self.object_store_gb} must not be negative; 0 chooses automatically")
        workers = self.workers
        if workers == 0:
            workers = len(indices) or kind_of(device).count()
        config = ParallelConfig.for_workers(workers, self.ulysses, self.ring, self.cfg_degree)
        config = replace(config, shares=parse_shares("shares", self.shares, workers))
        request = ClusterRequest(
            workers=workers,
            device=device,
            address=self.address,
            gpu_indices=indices,
            object_store_bytes=int(self.object_store_gb * 2**30),
        )
        request.gpus()
        return request, config
