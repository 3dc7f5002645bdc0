"""The machine that something was measured on, and what else ran on it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from rayltx.about import VERSION
from rayltx.comfy_dist.comfy_environment import version_of
from rayltx.devices import CPU, automatic, kind_of

_BUSY = 0.3  # of a core, that others' work takes: from here on it shows in times
_MINUTE = 60.0  # over which the kernel's first load average is taken
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int  # that this process may use
    devices: tuple[str, ...]  # GPUs
    system: str
    versions: dict[str, str]

    def __str__(self) -> str:
        devices = ", ".join(self.devices) or "no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.cpu}, {self.cores} {'core' if self.cores == 1 else 'cores'}; {devices}; {self.system}; {versions}"
        )


@dataclass(frozen=True)
class Load:
    """The load average of a minute, before and after, where the system tells it; else None."""

    cores: int
    processes: int  # of the measurement itself, that are busy
    before: float | None
    after: float | None = None
    seconds: float = 0.0  # between them

    @classmethod
    def begin(cls, processes: int) -> Load:
        return cls(_cores(), processes, _load_average())

    def ended(self, seconds: float) -> Load:
        return dataclasses.replace(self, after=_load_average(), seconds=seconds)

    @property
    def others(self) -> bool:
        """Whether other work ran on the machine, as far as averages tell: before, and after less what the measurement adds."""
        if self.before is None:
            return False
        own = self.processes * (1.0 - math.exp(-self.seconds / _MINUTE))
        at_end = 0.0 if self.after is None else self.after - own
        return max(self.before, at_end) / self.cores > _BUSY

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return "load average unknown"
        return (
            f"load average {self.before:.1f} before and {self.after:.1f} after, of {self.cores} cores, "
            f"{min(self.processes, self.cores)} of them the measurement's own; {self.seconds:.0f} s"
        )


def machine(comfyui: Path | None = None) -> Machine:
    """This machine. comfyui: the folder of a ComfyUI, whose version is told too."""
    kind = kind_of(automatic())
    devices = () if kind.name == CPU else kind.names()
    return Machine(_cpu(), _cores(), devices, f"{platform.system()} {platform.release()}", _versions(comfyui))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _versions(comfyui: Path | None) -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in ("torch", "ray", "diffusers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["RayLTX"] = VERSION
    if comfyui is not None and (version := version_of(comfyui)):
        found["ComfyUI"] = version
    return found
