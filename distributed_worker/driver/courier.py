"""The process that Ray calls its driver. Its argument is the descriptor of the pipe.

It imports neither torch nor ComfyUI. It ends when the pipe does, and takes all that it has started along.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from rayltx.distributed_worker.driver.deadline import called_after
from rayltx.distributed_worker.driver.processes import end_session, remove_folder
from rayltx.distributed_worker.driver.protocol import (
    LOCAL,
    TELL_S,
    Answered,
    CallWorkers,
    Ended,
    EndWorker,
    Keep,
    LetGo,
    NotAnswered,
    Running,
    Serve,
    Started,
    StartRay,
    StartWorker,
)
from rayltx.errors import first_line

logger = logging.getLogger(__name__)

_WATCH_S = 0.5
_SHUTDOWN_S = 5.0
_PIPE_CLOSED = "the pipe is closed"
_RAYS_OWN = ("gcs_server", "raylet")  # without which nothing goes on


class Courier:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._actors: dict[int, Any] = {}
        self._kept: dict[int, Any] = {}
        self._answers: queue.SimpleQueue[tuple[int, Future[bytes]]] = queue.SimpleQueue()  # of calls that have ended
        self._folder = Path()
        self._is_joined = False  # to a cluster that others have started

    def run(self) -> None:
        """Until the pipe ends, or Ray does."""
        start: StartRay = self._connection.recv()
        self._folder = Path(start.folder).parent
        threading.Thread(target=self._read, name="pipe", daemon=True).start()
        threading.Thread(target=self._tell, name="running", daemon=True).start()
        what = "Ray" if start.settings.is_local else f"the Ray cluster at {start.settings.address}"
        late = f"{what} was not there within {start.limit_s:.0f} s"
        with called_after(start.limit_s, self._end, late):
            store_bytes = self._start_ray(start)
            address = self._address()
        self._send(Started(store_bytes, address))
        self._start_thread("answers", self._hand_back)
        self._start_thread("watch", functools.partial(self._watch, _of_ray(), os.getppid()))
        while True:
            self._do(self._requests.get())

    def _start_thread(self, name: str, work: Callable[[], None]) -> None:
        """Without which nothing goes on: if it fails, everything ends."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._end(_told(error))
                raise

        threading.Thread(target=run, name=name, daemon=True).start()

    # ---- Ray

    def _start_ray(self, start: StartRay) -> int:
        import ray

        settings = start.settings
        common: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "namespace": settings.namespace,
        }
        if not settings.is_local:
            self._is_joined = True
            if start.package:
                common["runtime_env"] = {"py_modules": [start.package]}
            ray.init(address=settings.address, **common)
            return int(ray.cluster_resources().get("object_store_memory", 0))
        _stay_on_loopback()
        host, _, port = settings.dashboard.rpartition(":")
        dashboard = {"dashboard_host": host, "dashboard_port": int(port)} if host else {}
        _start_no_more_than_is_used(with_dashboard=bool(dashboard))
        ray.init(
            address=LOCAL,
            include_dashboard=bool(dashboard),
            **dashboard,
            num_cpus=0,  # nothing is given out by it, and Ray starts so many interpreters ahead
            # Ray's own count of memory to give out leaves the store's size out, and refuses to start when little is left.
            # Nothing here is given out by it.
            _memory=psutil.virtual_memory().total,
            num_gpus=0,  # GPUs are given out by what each worker's environment lets it see
            object_store_memory=settings.store_bytes,
            _temp_dir=start.folder,
            _node_ip_address="127.0.0.1",
            **common,
        )
        return settings.store_bytes

    def _place_of(self, request: StartWorker) -> Any:
        """Ranks in a row on one machine, the first on this one: it has the file that rank 0 reads. The others go where Ray finds
        devices, this machine's before others'.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        nodes = sorted(
            (node for node in ray.nodes() if node["Alive"]), key=lambda node: (node["NodeID"] != here, node["NodeID"])
        )
        needed = request.resources.get("num_gpus", 0)
        rooms = [int(node["Resources"].get("GPU", 0) // needed) if needed else 0 for node in nodes]
        if not needed:  # CPU ranks: an equal share to each machine
            rooms = [-(-request.num_ranks // len(nodes))] * len(nodes)
        rank = request.rank
        for node, room in zip(nodes, rooms):
            if rank < room:
                return NodeAffinitySchedulingStrategy(node["NodeID"], soft=request.rank > 0)
            rank -= room
        return "DEFAULT"

    def _address(self) -> str:
        import ray

        return ray.util.get_node_ip_address()

    # ---- requests

    def _read(self) -> None:
        try:
            while True:
                self._requests.put(self._connection.recv())
        except (EOFError, OSError):
            self._end(_PIPE_CLOSED)

    def _do(self, request: Any) -> None:
        import ray

        if isinstance(request, CallWorkers):
            for call, worker in request.calls:
                self._call(call, worker, functools.partial(self._asked, request))
        elif isinstance(request, Serve):
            self._call(request.call, request.worker, lambda actor: actor.serve.remote())
        elif isinstance(request, StartWorker):
            from rayltx.distributed_worker.driver.actor import RayWorker

            options: dict[str, Any] = {**request.resources, "max_restarts": 0}
            options["runtime_env"] = {"env_vars": dict(request.environment)}
            if not self._is_joined and shlex.quote(sys.executable) != sys.executable:
                # Ray hands it to a shell as it is: in a folder with a space no worker would start.
                options["runtime_env"]["py_executable"] = shlex.quote(sys.executable)
            if self._is_joined:
                options["scheduling_strategy"] = self._place_of(request)
            actor_class = ray.remote(**options)(RayWorker)
            self._actors[request.worker] = actor_class.remote(*request.arguments)
        elif isinstance(request, EndWorker):
            actor = self._actors.pop(request.worker, None)  # none: it went with an earlier Ray
            if actor is not None:
                ray.kill(actor)
        elif isinstance(request, Keep):
            import numpy as np

            with contextlib.suppress(ray.exceptions.RayError):  # the call that needs it is not answered, and says so
                self._kept[request.number] = ray.put(np.frombuffer(request.data, np.uint8))
        elif isinstance(request, LetGo):
            for number in request.kept:
                self._kept.pop(number, None)

    def _call(self, call: int, worker: int, ask: Callable[[Any], Any]) -> None:
        """ask: asks an actor, and gives what Ray gives for the answer."""
        actor = self._actors.get(worker)
        try:
            if actor is None:
                raise LookupError("the worker was ended")
            # What is called back keeps the answer, and runs in a thread of Ray's, which nothing may hold up.
            ask(actor).future().add_done_callback(lambda answer: self._answers.put((call, answer)))
        except Exception as error:  # whatever Ray raises for what it cannot send
            logger.exception("a call could not be handed on")
            self._send(NotAnswered(call, _told(error)))

    def _asked(self, request: CallWorkers, actor: Any) -> Any:
        kept = [self._kept[number] for number in request.kept]
        if request.keep_as is None:
            return actor.run.remote(request.payload, *kept)
        answer, self._kept[request.keep_as] = actor.run_and_keep.options(num_returns=2).remote(request.payload, *kept)
        return answer

    # ---- answers

    def _hand_back(self) -> None:
        import ray

        while True:
            call, answer = self._answers.get()
            try:
                self._send(Answered(call, answer.result()))
            except ray.exceptions.RayError as error:
                self._send(NotAnswered(call, first_line(error)))

    def _send(self, message: object) -> None:
        with self._sending, contextlib.suppress(OSError):  # the other end is gone: the reading thread ends this
            self._connection.send(message)

    def _tell(self) -> None:
        while True:
            self._send(Running())
            time.sleep(TELL_S)

    # ---- the end

    def _watch(self, processes: dict[str, psutil.Process], owner: int) -> None:
        while True:
            for name, process in processes.items():
                if _has_ended(process):
                    self._end(f"its process {name} ended")
            if os.getppid() != owner:  # of which a forked child can hold the pipe still
                self._end(_PIPE_CLOSED)
            time.sleep(_WATCH_S)

    def _end(self, reason: str) -> None:
        """Tell why, end everything, and this process."""
        with self._ending:
            self._send(Ended(reason))
            closing = threading.Thread(target=_shut_ray_down, daemon=True)
            closing.start()
            closing.join(_SHUTDOWN_S)
            end_session(os.getpid())
            if reason is _PIPE_CLOSED:
                remove_folder(self._folder)  # nobody else may be left to do it
            os._exit(0)


def _stay_on_loopback() -> None:
    """Let Ray take 127.0.0.1 for this machine's address, which makes all of its processes listen there alone.

    It looks another address up in its place, for other machines to reach: there are none.
    """
    from ray._private import services

    services.resolve_ip_for_localhost = lambda host: host


def _start_no_more_than_is_used(with_dashboard: bool) -> None:
    """Let Ray leave out what is for other uses of it: what asks a cloud for machines, what sends logs to its driver, and what
    serves a dashboard and its jobs. Each is an interpreter, with its memory and its time at the start.

    Ray has options for the first two that `ray.init` does not take, and starts the last without a dashboard too. Where its
    packages are installed, other parts of Ray look for it for ever.
    """
    import ray._private.utils as utils
    from ray._private.node import Node

    names = ["start_monitor", "start_log_monitor"]
    if not with_dashboard and getattr(utils, "get_dashboard_dependency_error", lambda: None)() is not None:
        names.append("start_api_server")
    for name in names:
        if hasattr(Node, name):
            setattr(Node, name, lambda node, *args, **kwargs: None)


def _of_ray() -> dict[str, psutil.Process]:
    """Ray's own processes, by name; none of a Ray that others have started."""
    return {process.name(): process for process in psutil.Process().children() if process.name() in _RAYS_OWN}


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _shut_ray_down() -> None:
    import ray

    ray.shutdown()


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def main() -> None:
    courier = Courier(Connection(int(sys.argv[1])))
    try:
        courier.run()
    except BaseException as error:
        courier._end(_told(error))  # noqa: SLF001
        raise
