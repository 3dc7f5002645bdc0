"""Where a MODEL runs, and how its ranks share the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rayltx.comfy_dist.comfy_environment import ComfyEnvironment
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.sequence_parallel.partition import ParallelConfig


@dataclass(frozen=True)
class Placement:
    """Where a MODEL runs, and how its ranks share the work. It travels with the MODEL, from node to node.

    It names the workers by what was asked for, so it is never a stale handle: whoever samples gets the cluster that runs,
    or a new one. Raises ParallelConfigError for more ranks than workers.
    """

    request: ClusterRequest
    config: ParallelConfig
    free_after_sampling: bool = False  # give the devices' memory back at the end of a run
    weight_budget: int = 0  # bytes of weights on a device at most, the rest is streamed; 0: as many as fit
    chooses_ranks: bool = False  # whether fewer ranks take a step where all are no faster

    def __post_init__(self) -> None:
        self.config.check_workers(self.request.workers)

    @property
    def comfyui_arguments(self) -> Mapping[str, object]:
        """The command line's arguments of the workers' ComfyUI."""
        bootstrap = self.request.bootstrap
        environment = None if bootstrap is None else bootstrap.payload
        return environment.arguments if isinstance(environment, ComfyEnvironment) else {}
