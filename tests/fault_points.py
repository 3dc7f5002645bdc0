"""Faults inside of the calls of workers, in the one that the driver's side names. Imported by the workers, too.

An order is an empty file whose name says where the fault is: a method's class and name, and whether it comes before or after the
method's own work. The worker that renames the file has the fault, so that one alone has it, once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rayltx.distributed_worker.request import Bootstrap
from rayltx.distributed_worker.worker import Worker, import_dotted
from rayltx.distributed_worker.worker_calls import kind_of

BEGIN, END = "begin", "end"
RAISE, EXIT, HANG = "raise", "exit", "hang"
HOST_CALL, HOST_CALL_TOGETHER = "Worker.call_host", "Worker.call_host_together"  # also "host." and the method's name


@dataclass(frozen=True)
class FaultPoints:
    """Where orders lie, and on what they are carried out.

    hosts: "module:Class" of those whose marked methods have points, besides the worker's. inner: to be called as well.
    """

    folder: str
    hosts: tuple[str, ...] = ()
    inner: Bootstrap | None = None

    def bootstrap(self) -> Bootstrap:
        return Bootstrap("fault_points:arm", self)

    # ---- on the driver's side

    def order(self, kind: str, point: str, at: str = BEGIN) -> None:
        """point: such as "Worker.build"."""
        (Path(self.folder) / _name(kind, point, at)).touch()

    def num_carried_out(self, kind: str, point: str, at: str = BEGIN) -> int:
        return len(list(Path(self.folder).glob(f"{_name(kind, point, at)}-by-*")))

    def clear(self) -> None:
        for path in Path(self.folder).iterdir():
            path.unlink()

    # ---- in a worker

    def _at(self, point: str, at: str) -> None:
        for kind in (RAISE, EXIT, HANG):
            path = Path(self.folder) / _name(kind, point, at)
            with contextlib.suppress(FileNotFoundError):  # no order, or another worker's
                os.rename(path, f"{path}-by-{os.getpid()}")
                _carry_out(kind, point)

    def with_points(self, method: Callable, point: str) -> Callable:
        @functools.wraps(method)  # with its mark
        def run(*args, **kwargs):
            points = [point]
            if point in (HOST_CALL, HOST_CALL_TOGETHER):
                points.append(f"host.{args[2]}")  # after the worker and the model's id
            for each in points:
                self._at(each, BEGIN)
            result = method(*args, **kwargs)
            for each in points:
                self._at(each, END)
            return result

        return run


def _name(kind: str, point: str, at: str) -> str:
    return f"{kind}-at-{at}-of-{point}"


def _carry_out(kind: str, point: str) -> None:
    if kind == RAISE:
        raise RuntimeError(f"as ordered, in {point}")
    if kind == EXIT:
        os._exit(1)
    time.sleep(3600)


def points_of(asked: type) -> list[str]:
    """All that its marked methods have."""
    return [f"{asked.__name__}.{name}" for name, method in vars(asked).items() if callable(method) and kind_of(method)]


def arm(points: FaultPoints, device: str) -> None:
    """A bootstrap: let the methods that a worker can be asked look for orders."""
    for asked in (Worker, *map(import_dotted, points.hosts)):
        for point in points_of(asked):
            name = point.partition(".")[2]
            setattr(asked, name, points.with_points(getattr(asked, name), point))
    if points.inner is not None:
        import_dotted(points.inner.function)(points.inner.payload, device)
    points._at("Worker.prepare", BEGIN)  # which is what runs this
