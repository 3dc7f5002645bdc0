"""What faults are done to: models on CPU ranks, undisturbed answers to compare with, and what became of a try."""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from page_tables import row

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
sys.path[:0] = [str(ROOT / "importable"), str(TESTS)]

import torch  # noqa: E402

from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel  # noqa: E402
from rayltx.diffusion_models.lightricks.exactness import Case  # noqa: E402
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape  # noqa: E402
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint  # noqa: E402
from rayltx.distributed_worker.cluster import Cluster  # noqa: E402
from rayltx.distributed_worker.driver.processes import processes_of  # noqa: E402
from rayltx.distributed_worker.remote_model import RemoteModel  # noqa: E402
from rayltx.distributed_worker.request import ClusterRequest  # noqa: E402
from rayltx.distributed_worker.worker_calls import ask, ask_together  # noqa: E402
from rayltx.sequence_parallel.partition import ParallelConfig  # noqa: E402

from fault_points import FaultPoints  # isort: skip # noqa: E402
from cluster_hosts import ScalingHost  # isort: skip # noqa: E402

TWO = ParallelConfig(2, 1)
LONG = LatentShape(16, 32, 32)  # 16384 tokens: seconds a step
SHORT = LatentShape(8, 16, 16)
WITHIN_S = 10.0  # of the end of a process, in which nothing of it may be left
SCALING = "cluster_hosts:ScalingHost"


class TinyModel:
    """A checkpoint of random weights, what a host makes of it, and inputs."""

    def __init__(self, path: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.spec = DiffusersModel.of_checkpoint(self.checkpoint)
        self.long, self.short = (Case("fault", shape=shape).inputs(self.spec) for shape in (LONG, SHORT))

    @classmethod
    def made(cls, path: Path, seed: int = 0) -> TinyModel:
        save_tiny_checkpoint(path, "LTX-Video", seed)
        return cls(path)

    def on(self, cluster: Cluster, host: str = "") -> RemoteModel:
        return cluster.load(self.checkpoint, self.spec, host=host)


@dataclass
class Subject:
    """A model that is loaded, and steps of it."""

    cluster: Cluster
    remote: RemoteModel
    inputs: dict[str, Any]
    usual_s: float = 0.0  # of a step

    def step(self, fault: Callable[[], None] | None = None) -> tuple[torch.Tensor, float]:
        """The answer and the seconds of a step, in whose middle something happens."""
        started, done = time.monotonic(), []

        def poll() -> None:
            if fault is not None and not done and time.monotonic() - started > 0.4 * self.usual_s:
                done.append(True)
                fault()

        answer = self.remote.forward(self.inputs, TWO, poll=poll)
        assert fault is None or done, "the step was faster than the fault"
        return answer["video"], time.monotonic() - started

    def measure(self) -> torch.Tensor:
        """What an undisturbed step answers, whose seconds are noted."""
        reference, first_s = self.step()
        self.usual_s = statistics.median([first_s, *(self.step()[1] for _ in range(2))])
        return reference

    def rank(self, number: int) -> int:
        return self.cluster.workers()[number].pid

    def process(self, name: str) -> int:
        return next(process.pid for process in processes_of(self.cluster.driver.session) if name in process.name())


@dataclass
class Tried:
    """What became of a fault. None: not looked at."""

    equal: int | None
    next_equal: int | None = None
    lost_s: float | None = None
    left: int | None = None  # processes and folders
    tries: int = 1
    note: str = ""


def row_of(name: str, tried: Sequence[Tried]) -> str:
    """One line of the table, for tries of the same."""

    def total(field: str) -> int | None:
        values = [getattr(each, field) for each in tried]
        return None if None in values else sum(values)

    lost = [each.lost_s for each in tried if each.lost_s is not None]
    equal, next_equal, left = total("equal"), total("next_equal"), total("left")
    return row(
        name + (f" ({tried[-1].note})" if tried[-1].note else ""),
        sum(each.tries for each in tried),
        "-" if equal is None else equal,
        f"{statistics.median(lost):.0f} s" if lost else "-",
        "-" if left is None else left,
        "-" if next_equal is None else f"{next_equal} equal",
    )


class NotTriedHere(Exception):
    """The message says why."""


class Bench:
    """What the cases share: a folder, two models, and what undisturbed ranks answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.other = (
            TinyModel.made(folder / "model.safetensors"),
            TinyModel.made(folder / "other.safetensors", seed=1),
        )
        self.plain = ClusterRequest(workers=2)
        (folder / "orders").mkdir()
        self.points = FaultPoints(str(folder / "orders"), (SCALING,))
        self.armed = ClusterRequest(workers=2, host=SCALING, bootstrap=self.points.bootstrap())
        cluster = Cluster.start(self.plain)
        self.short, self.others_short = (
            model.on(cluster).forward(model.short, TWO)["video"] for model in (self.model, self.other)
        )
        self.alone = self.model.on(cluster).forward(self.model.short, ParallelConfig(1, 1))["video"]

    @functools.cached_property
    def _long(self) -> tuple[torch.Tensor, float]:
        """Found when it is first asked for: before a case starts a cluster of its own."""
        cluster = Cluster.start(self.plain)
        subject = Subject(cluster, self.model.on(cluster), self.model.long)
        return subject.measure(), subject.usual_s

    @property
    def reference(self) -> torch.Tensor:
        """What an undisturbed step of the long kind answers."""
        return self._long[0]

    @property
    def usual_s(self) -> float:
        """What it takes."""
        return self._long[1]

    def subject(self, cluster: Cluster, host: str = "") -> Subject:
        return Subject(cluster, self.model.on(cluster, host), self.model.long, self.usual_s)

    def prompt(self, cluster: Cluster, before_two: Callable[[], None] = lambda: None) -> tuple[torch.Tensor, ...]:
        """All that workers are asked in turn, on one rank and on two: whose count, and answers. The host triples these."""
        remote = self.model.on(cluster)
        try:
            remote.set_up("factor", ask(ScalingHost.set_factor, torch.tensor(3.0)), "setting the factor")
            one = remote.forward(self.model.short, ParallelConfig(1, 1))["video"]
            before_two()
            num_ranks = remote.call_together(ask_together(ScalingHost.meet), TWO, "the test of the ranks")
            return torch.tensor(num_ranks), one, remote.forward(self.model.short, TWO)["video"]
        finally:
            remote.release()

    def is_whole(self, answers: tuple[torch.Tensor, ...]) -> bool:
        num_ranks, one, two = answers
        return int(num_ranks) == 2 and torch.equal(one, 3.0 * self.alone) and torch.equal(two, 3.0 * self.short)

    def close(self) -> None:
        end_current()

    def usual_prompt_s(self) -> float:
        """Of a prompt on workers that have had one."""
        self.prompt(Cluster.start(self.armed))
        return seconds_of(lambda: self.prompt(Cluster.start(self.armed)))[1]

    @functools.cached_property
    def usual_start_s(self) -> float:
        """Of a start, and a prompt."""
        end_current()
        return seconds_of(lambda: self.prompt(Cluster.start(self.armed)))[1]


def seconds_of(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    return work(), time.monotonic() - started


def end_current() -> None:
    if (cluster := Cluster.current()) is not None:
        cluster.shutdown()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def left_of(session: int, folder: Path) -> int:
    """Of a cluster that has ended."""
    wait_for(lambda: not processes_of(session) and not folder.exists())
    return len(processes_of(session)) + folder.exists()


def superfluous_workers(cluster: Cluster) -> int:
    """Processes of workers that were replaced."""
    cluster.workers()
    found = [process for process in processes_of(cluster.driver.session) if "RayWorker" in process.name()]
    return len(found) - cluster.request.workers
