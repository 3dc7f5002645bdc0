"""What a machine is, as far as workers care, and what of it is wrong: for the log, and for whoever asks."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import ray
import torch

from rayltx.about import VERSION
from rayltx.distributed_worker.machine_checks import check_machine, differing_cards
from rayltx.distributed_worker.object_store import SHARED_MEMORY, fits_object_store, object_store_bytes
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import DeviceError, UserError

_GIB = 2**30
_SPARE_BYTES = 4 * _GIB  # of memory, for ComfyUI, the workers' own processes and what they exchange


@dataclass(frozen=True)
class Fact:
    """problem: what is wrong with it, and what to do; "" if nothing is. Picklable, and JSON by `dataclasses.asdict`."""

    name: str
    value: str
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.value}"


def machine_facts(request: ClusterRequest, weight_bytes: int = 0, measure: bool = True) -> list[Fact]:
    """Everything that can be said without starting anything.

    weight_bytes: of the checkpoint that is to be loaded; 0 for none. measure: what is free on the devices, too, for which the
    driver takes some of their memory in this process.
    """
    return [*_software(), *_devices(request, measure), *_host_memory(request, weight_bytes)]


def log_line(request: ClusterRequest) -> str:
    """The facts on one line."""
    facts = machine_facts(request, measure=False)
    return ", ".join(str(fact) for fact in facts if fact.name not in ("Python", "system"))


def memory_problem(weight_bytes: int) -> str:
    """What is wrong with this machine's memory for such weights; "" if nothing is."""
    total = psutil.virtual_memory().total
    if weight_bytes + _SPARE_BYTES <= total:
        return ""
    return (
        f"{weight_bytes / _GIB:.1f} GiB of weights and {_SPARE_BYTES / _GIB:.0f} GiB besides do not fit {total / _GIB:.1f} GiB "
        "of memory: they are read from the disk again at every step; use a smaller file (fp8, GGUF), or more memory"
    )


def _software() -> Iterator[Fact]:
    yield Fact("RayLTX", VERSION)
    yield Fact("system", f"{platform.system()} {platform.release()}")
    yield Fact("Python", platform.python_version())
    yield Fact("torch", torch.__version__)
    yield Fact("Ray", ray.__version__)
    for package in ("comfy-kitchen", "flash-attn", "sageattention"):
        try:
            yield Fact(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue


def _devices(request: ClusterRequest, measure: bool) -> Iterator[Fact]:
    try:
        check_machine(request)
        problem = ""
    except UserError as error:
        problem = str(error)
    kind = request.kind
    yield Fact("devices", f"{request.workers} x {kind.name}", problem)
    if request.on_cpu or not kind.count():
        return
    if differing := differing_cards(request):
        yield Fact("cards", "not all the same", differing)
    yield Fact("driver", kind.description())
    for number, name in enumerate(kind.names()):
        total = kind.total_bytes(number)
        try:
            free = kind.free_bytes(number) if measure else total
        except RuntimeError as error:  # not even a context fits
            yield Fact(f"{kind.name}:{number}", f"{name}, {total / _GIB:.1f} GiB", str(error).splitlines()[0])
            continue
        taken = f"{(total - free) / _GIB:.1f} GiB are in use by other programs" if free < 0.8 * total else ""
        yield Fact(f"{kind.name}:{number}", f"{name}, {total / _GIB:.1f} GiB", taken)
    count = kind.count()
    if count > 1:
        apart = [f"{a}-{b}" for a, b in itertools.combinations(range(count), 2) if not kind.reaches(a, b)]
        yield Fact(
            "peer access", f"none between {', '.join(apart)}: data goes through host memory" if apart else "between all"
        )


def _host_memory(request: ClusterRequest, weight_bytes: int) -> Iterator[Fact]:
    memory = psutil.virtual_memory()
    value = f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} GiB available"
    yield Fact("memory", value, memory_problem(weight_bytes))
    if not SHARED_MEMORY.is_dir():
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    try:
        store = object_store_bytes(request.object_store_bytes, request.kept_shared_memory)
        small = "" if not weight_bytes or fits_object_store(weight_bytes, store, 0) else (
            f"a store of {store / _GIB:.1f} GiB cannot hold {weight_bytes / _GIB:.1f} GiB of weights: the workers map the file "
            "itself, which a GPU that they do not fit reads more slowly; enlarge it (in a container: --shm-size)"
        )  # fmt: skip
    except DeviceError as error:
        small = str(error)
    yield Fact(str(SHARED_MEMORY), f"{usage.total / _GIB:.1f} GiB, {usage.free / _GIB:.1f} GiB free", small)
