"""`rayltx bench start`: what it takes until workers are ready, against one process that imports torch and the model's code."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from rayltx.about import python_path
from rayltx.cli.bench.measurements import Arm, Clock, Measurement
from rayltx.cli.bench.report import Output, at_least, in_turn, reporting
from rayltx.cli.packages import require_packages
from rayltx.comfy_dist.comfy_environment import ComfyEnvironment, check_comfyui, enter
from rayltx.comfy_dist.comfy_host import COMFY_HOST
from rayltx.devices import CPU
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import DIFFUSERS_HOST, ClusterRequest
from rayltx.errors import ClusterError


@dataclass(frozen=True)
class StartOptions:
    workers: int
    rounds: int
    comfyui: Path | None


def run_start(options: StartOptions, output: Output) -> None:
    """Print. Raises InputError and MissingPackageError."""
    at_least(workers=(options.workers, 1), rounds=(options.rounds, 1))
    if options.comfyui is None:
        require_packages(("diffusers",), "bench start")
    else:
        check_comfyui(options.comfyui)
    with reporting("start", vars(options), output, options.workers + 1, options.comfyui) as report:
        starts = {
            "one process that imports": _Start(lambda: _one_process(options)),
            f"{options.workers} worker{'s' if options.workers > 1 else ''}": _Start(lambda: _cluster(options)),
        }
        processor = in_turn({name: start.processor_seconds for name, start in starts.items()}, options.rounds)
        wall = tuple(Arm(name, tuple(start.wall[1:])) for name, start in starts.items())  # the first one warms up
        report.measurements.append(
            Measurement("until ready, processor time of all processes", "s", Clock.PROCESSOR, processor)
        )
        report.measurements.append(Measurement("until ready, wall time", "s", Clock.WALL, wall))
        report.remarks.append(
            "workers: from Cluster.start until all have said who they are, Ray's own processes included; ending is not in it"
        )


class _Start:
    def __init__(self, run: Callable[[], tuple[float, float]]) -> None:
        self._run = run
        self.wall: list[float] = []

    def processor_seconds(self) -> float:
        processor, wall = self._run()
        self.wall.append(wall)
        return processor


def _cluster(options: StartOptions) -> tuple[float, float]:
    """Seconds: of the processor, and that passed."""
    request = ClusterRequest(workers=options.workers)
    if options.comfyui is not None:
        environment = _environment(options.comfyui)
        request = dataclasses.replace(request, host=COMFY_HOST, bootstrap=environment.bootstrap())
    processor, began = _family_seconds(), time.monotonic()
    with Cluster.start(request) as cluster:
        cluster.workers()
        return _family_seconds() - processor, time.monotonic() - began


def _family_seconds() -> float:
    """Processor time of this process and those that it began, as far as they live or have been waited for."""
    found = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        ended = 0.0 if process == me else times.children_user + times.children_system
        found += times.user + times.system + ended
    return found


def _one_process(options: StartOptions) -> tuple[float, float]:
    folder = "" if options.comfyui is None else str(options.comfyui.resolve())
    code = f"from rayltx.cli.bench.start import import_model_code; import_model_code({folder!r})"
    environment = {**os.environ, "PYTHONPATH": python_path()}
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ClusterError(
            f"a process that imports the model's code ended with {process.returncode}; it says why above"
        )
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began


def import_model_code(comfyui: str) -> None:
    """What a process needs that runs the model. comfyui: a ComfyUI's folder, or "" for diffusers' model."""
    if comfyui:
        enter(_environment(Path(comfyui)), CPU)
    importlib.import_module((COMFY_HOST if comfyui else DIFFUSERS_HOST).partition(":")[0])


def _environment(comfyui: Path) -> ComfyEnvironment:
    return ComfyEnvironment.headless(str(comfyui.resolve()), cpu=True)
