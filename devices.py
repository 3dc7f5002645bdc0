"""The kinds of devices that ranks run on: what each is called where, and what it is asked.

Only the choice of attention kernels (`sequence_parallel/local_attention.py`) asks torch.cuda by itself. ROCm is torch.cuda
too, under other names outside of torch. The names for ROCm and XPU are those of their documentation: nothing of RayLTX has
run on either.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed
from torch import Tensor

from rayltx.errors import DeviceError

logger = logging.getLogger(__name__)

CPU = "cpu"
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class DeviceKind:
    """`name` is torch's."""

    name: str
    collectives: str  # the backend of torch.distributed
    visible_variable: str  # of the environment: which devices a process may use; "": it has no choice
    # These choose among the visible ones once more, where they are set: a worker must not inherit them.
    overriding_variables: tuple[str, ...] = ()
    # What keeps devices from copying to each other's memory, in the environment of a process that starts.
    peer_to_peer_off: tuple[tuple[str, str], ...] = ()

    @property
    def _module(self) -> ModuleType:
        return getattr(torch, self.name)

    def count(self) -> int:
        """How many of them this process can use; of CPUs, one."""
        return 1 if self.name == CPU else self._module.device_count()

    def visible(self, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
        """The devices that this process can use, as `visible_variable` spells them: numbers or UUIDs."""
        variables = (*self.overriding_variables, self.visible_variable)
        return visible_devices(
            next((environment[name] for name in variables if name in environment), None), self.count()
        )

    def names(self) -> tuple[str, ...]:
        """What the devices are called that this process can use, in the order of `visible`."""
        if self.name == CPU:
            return ("CPU",)
        return tuple(self._module.get_device_name(index) for index in range(self.count()))

    def description(self) -> str:
        """The first device that this process can use, and what it computes and talks with: changes if either does."""
        if self.name == CPU:
            return "CPU"
        properties = self._module.get_device_properties(0)
        told = [properties.name]
        told += [f"{name} {getattr(properties, name)}" for name in ("major", "minor") if hasattr(properties, name)]
        toolkits = {name: getattr(torch.version, name, None) for name in ("cuda", "hip", "xpu")}
        told += [f"{name} {version}" for name, version in toolkits.items() if version]
        if _NVIDIA_DRIVER.is_file():
            told.append(_NVIDIA_DRIVER.read_text().splitlines()[0])
        if self.collectives == "nccl" and torch.distributed.is_nccl_available():
            told.append(f"nccl {torch.cuda.nccl.version()}")
        return ", ".join(told)

    def pinned_to(self, device: str) -> dict[str, str]:
        """The environment of a process that may use this one of the `visible` devices alone."""
        return {self.visible_variable: device, **dict.fromkeys(self.overriding_variables, device)}

    def total_bytes(self, index: int = 0) -> int:
        """Memory of a device that this process can use; of the machine, for the CPU. The driver takes none of it for this."""
        if self.name == CPU:
            return psutil.virtual_memory().total
        return self._module.get_device_properties(index).total_memory

    def free_bytes(self, index: int = 0) -> int:
        """Of the memory of a device that this process can use; of the machine, for the CPU."""
        if self.name == CPU:
            return psutil.virtual_memory().available
        return self._module.mem_get_info(index)[0]

    def reaches(self, one: int, other: int) -> bool:
        """Whether a device can copy to and from another's memory by itself, as the driver has it."""
        return self.name == "cuda" and torch.cuda.can_device_access_peer(one, other)

    def memory_report(self) -> str:
        """What is known of the first device's memory, for messages; "" for the CPU."""
        if self.name == CPU:
            return ""
        gib = 2**30
        try:
            free, total = self._module.mem_get_info(0)
            peak = self._module.max_memory_allocated(0)
        except RuntimeError:  # not even a context fits
            return ""
        return f"peak {peak / gib:.2f} GiB, {free / gib:.2f} of {total / gib:.2f} GiB free"

    @property
    def probe_bytes(self) -> int:
        """That a rank sends to have the link between such devices tried and timed."""
        return 2**20 if self.name == CPU else 2**25

    # ---- copies that run next to computing

    def copies_by_itself(self) -> bool:
        """Whether such a device has streams, and copies from the host's memory while it computes and the host goes on."""
        return self.name != CPU and hasattr(self._module, "Stream")

    def new_stream(self) -> Any:
        return self._module.Stream()

    def in_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """What is asked of the device within the `with` goes to a stream of it."""
        return self._module.stream(stream)

    def current_stream(self) -> Any:
        return self._module.current_stream()

    def new_event(self) -> Any:
        return self._module.Event()

    def host_buffer(self, num_bytes: int) -> Tensor:
        """(num_bytes,) uint8 on the host, which the device can copy from by itself."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def register_host_memory(self, address: int, num_bytes: int) -> bool:
        """Let the device copy by itself from memory that is there. Returns False where its driver does not take it."""
        if self.name != "cuda":
            return False
        code = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
        if code:
            logger.info("the driver cannot read %d bytes of host memory by itself (error %d)", num_bytes, code)
            # The runtime reports an error once more, to whoever asks next.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.name).add_(1).cpu()
        return code == 0

    def unregister_host_memory(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)

    def give_back_memory(self) -> None:
        """Return what torch's allocator holds unused."""
        if self.name != CPU:
            self._module.empty_cache()


def _cuda() -> DeviceKind:
    # HIP_VISIBLE_DEVICES chooses among what ROCR_VISIBLE_DEVICES leaves, and wins over CUDA_VISIBLE_DEVICES.
    overriding = () if torch.version.hip is None else ("HIP_VISIBLE_DEVICES",)
    return DeviceKind("cuda", "nccl", "CUDA_VISIBLE_DEVICES", overriding, (("NCCL_P2P_DISABLE", "1"),))


KINDS = {
    CPU: DeviceKind(CPU, "gloo", ""),
    "cuda": _cuda(),
    "xpu": DeviceKind("xpu", "xccl", "ZE_AFFINITY_MASK"),
}


def visible_devices(names: str | None, count: int) -> tuple[str, ...]:
    """The devices that a process sees, as the variable spells them that says which.

    names: that variable, or None where it is not set; it may hold numbers or UUIDs. count: how many torch reports.
    """
    if names is None:
        return tuple(str(index) for index in range(count))
    # The drivers ignore the list from the first entry on that they cannot find.
    return tuple(part.strip() for part in names.split(",") if part.strip())[:count]


def kind_of(name: str) -> DeviceKind:
    """Raises DeviceError for a device that ranks cannot run on."""
    if name not in KINDS:
        raise DeviceError(f'device="{name}" must be one of {", ".join(KINDS)}')
    return KINDS[name]


def automatic() -> str:
    """What ranks run on where nothing else is asked: the machine's accelerator, or its CPU."""
    found = (name for name in KINDS if name != CPU and getattr(torch, name).is_available())
    return next(found, CPU)


_OUT_OF_MEMORY = (
    "CUDA error: out of memory", "HIP error: out of memory", "failure 2 'out of memory'",  # the last is NCCL's
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory ran out: each library has its own way of saying so."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OUT_OF_MEMORY)
