"""What is asked of a cluster, and what a model is loaded from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch

from rayltx.devices import CPU, DeviceKind, kind_of
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.distributed_worker.driver.protocol import LOCAL
from rayltx.distributed_worker.gpu_pinning import assign_gpus
from rayltx.distributed_worker.messages import Refer
from rayltx.errors import DeviceError, InputError, ParallelConfigError

_COLLECTIVES_BYTES = 2**30
DIFFUSERS_HOST = "rayltx.diffusion_models.lightricks.diffusers_host:DiffusersHost"


@dataclass(frozen=True)
class Bootstrap:
    """What each worker calls before it imports a host: `function(payload, device)`."""

    function: str  # "package.module:name"
    payload: object


@dataclass(frozen=True)
class ClusterRequest:
    """What is asked of a cluster. Two equal requests are served by the same workers."""

    workers: int
    device: str = CPU  # or another of `devices.KINDS`
    address: str = LOCAL  # start Ray here, or join the cluster at this address
    namespace: str = "default"
    gpu_indices: tuple[int, ...] = ()
    object_store_bytes: int = 0  # 0: automatic
    map_files: bool = False  # let the workers map the checkpoint itself, without the object store
    dashboard: str = ""  # host:port of Ray's dashboard; "": none
    group_address: str = ""  # host:port where the ranks meet; "": a free port
    # Limits: of a step since its last block; of every other call; and of a block, the least that it may take.
    step_timeout_s: float = 1800.0
    call_timeout_s: float = 300.0
    block_timeout_s: float = 20.0
    machine_record: str = ""  # file of what was found out about the machine; "": nothing is remembered
    host: str = DIFFUSERS_HOST  # "package.module:Class", imported ahead of its use
    bootstrap: Bootstrap | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ParallelConfigError(f"workers={self.workers} must be at least 1")
        for name in ("step_timeout_s", "call_timeout_s", "block_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} must be a number of seconds above 0")
        kind_of(self.device)

    @property
    def kind(self) -> DeviceKind:
        return kind_of(self.device)

    @property
    def on_cpu(self) -> bool:
        return self.device == CPU

    def gpu_names(self) -> tuple[str, ...]:
        """What the GPUs of `gpus` are called; () where there are none, or they are another machine's."""
        names = dict(zip(self.kind.visible(), self.kind.names())) if self.address == LOCAL and not self.on_cpu else {}
        return tuple(names[gpu] for gpu in self.gpus()) if names else ()

    def differences(self, other: ClusterRequest) -> list[str]:
        """The fields, by name, in which another request asks for something else."""
        return [each.name for each in fields(self) if getattr(self, each.name) != getattr(other, each.name)]

    @property
    def kept_shared_memory(self) -> int:
        """Bytes of shared memory that the workers need besides the object store: NCCL moves data through it."""
        return _COLLECTIVES_BYTES if self.workers > 1 and not self.on_cpu else 0

    def gpus(self) -> tuple[str, ...]:
        """Which GPU of this process each worker started here gets; () on the CPU and in another machine's cluster.

        Raises DeviceError if there are not enough GPUs.
        """
        if self.on_cpu or self.address != LOCAL:
            if self.gpu_indices:
                raise DeviceError(
                    "gpu_indices choose among this machine's GPUs: they need the device cuda and a local cluster"
                )
            return ()
        return assign_gpus(self.workers, self.gpu_indices, self.kind.visible())


@dataclass(frozen=True)
class ModelSource:
    """What a model on the workers is made from."""

    checkpoint: Checkpoint
    spec: object  # what the host class takes, next to the device
    host: str  # "package.module:Class"
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # of tensors that are converted when they are read
    keeps_host_copy: bool = (
        False  # the host keeps the shared weights when it has them on a GPU; on the CPU it always does
    )
    refer: Refer | None = None  # what the workers know by name, for objects inside of what they are sent

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as the workers hold them."""
        return sum(
            info.num_elements * self.dtypes.get(name, info.dtype).itemsize
            for name, info in self.checkpoint.tensors.items()
        )
