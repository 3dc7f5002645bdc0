"""Ray as ComfyUI's process sees it: workers that are called, answers that are waited for, and an end that is survived."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing.connection
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rayltx.about import python_path
from rayltx.distributed_worker.driver import protocol
from rayltx.distributed_worker.driver.kept import Kept
from rayltx.distributed_worker.driver.line import MOST_BYTES, Line
from rayltx.distributed_worker.driver.package import copy_package
from rayltx.distributed_worker.driver.processes import (
    RAYS_OWN,
    end_session,
    has_room,
    make_folder,
    note_owner,
    remove_folder,
    remove_leftovers,
)
from rayltx.distributed_worker.messages import dump_call

logger = logging.getLogger(__name__)

_START_LIMIT_S = 90.0
_CLOSE_S = 15.0
_LET_GO_S = 1.0  # after which what nobody needs any more is let go of, if nothing is sent before
_SILENT_S = 60.0  # without a sign of life, after which the courier is taken for stuck
_LOOK_S = 1.0
_JOIN_LIMIT_S = 30.0
_LOG = "courier.log"
_LINE_BROKE = "its line to this process broke"
# Without the working directory on its search path, which is ComfyUI's, and the workers' too: paths may be relative to it.
_COURIER = "import sys; sys.path[:] = filter(None, sys.path); from rayltx.distributed_worker.driver.courier import main; main()"
RAY_ENDED = "Ray ended: "  # how the failure of each call begins that went with it


@dataclass(eq=False)
class Answer:
    """What a call will give."""

    call: int
    worker: int
    payload: bytes | None = None
    failure: str | None = None  # why there is no payload, nor will be
    asked: object = None  # keeps what was asked, and what it shares, until it has been answered
    serve_call: int | None = None  # that has the worker read what was asked by line

    @property
    def is_done(self) -> bool:
        return self.payload is not None or self.failure is not None

    def end(self, payload: bytes | None = None, failure: str | None = None) -> None:
        """With what the call gave, or with why it gives nothing."""
        self.payload, self.failure, self.asked = payload, failure, None


@dataclass(eq=False)
class _Run:
    """One life of the courier."""

    folder: Path
    process: subprocess.Popen[bytes]
    socket: socket.socket
    connection: Any  # on the same descriptor
    store_bytes: int
    address: str = ""  # of this machine among Ray's nodes, when Ray has started
    answers: dict[int, Answer] = field(default_factory=dict)
    released: deque[int] = field(default_factory=deque)  # numbers to let go of; finalizers may come at any moment
    sending: Any = field(default_factory=threading.RLock)
    lines: dict[int, Line] = field(default_factory=dict)  # by worker
    reading: Line | None = None  # of which an answer is being read
    serving: dict[int, Line] = field(default_factory=dict)  # by the calls that have workers read them
    ended: str | None = None  # why
    heard: int = 0  # messages
    stuck: str = ""  # why it was killed, if it was
    reader: threading.Thread = field(default_factory=threading.Thread)


class RayDriver:
    """The way to Ray. Its calls return at once, and may come from any thread."""

    def __init__(self, settings: protocol.RaySettings) -> None:
        self._settings = settings
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._run = self._start()

    # ---- its life

    @property
    def is_running(self) -> bool:
        return self._run.ended is None

    @property
    def shares_memory(self) -> bool:
        """Whether the workers map what this process shares: those of a cluster may be on other machines."""
        return self._settings.is_local

    @property
    def session(self) -> int:
        """The session (setsid(2)) of all processes that were started."""
        return self._run.process.pid

    @property
    def folder(self) -> Path:
        """Of Ray's files, and of others that go when it goes."""
        return self._run.folder

    def store_bytes(self, timeout_s: float) -> int:
        """The object store's size. Waits for Ray to have started where it is another's."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._run.store_bytes and self.is_running and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
        return self._run.store_bytes

    @property
    def has_room(self) -> bool:
        """Whether Ray can write: without it no worker starts. Another start chooses a folder anew."""
        return has_room(self._run.folder)

    @property
    def address(self) -> str:
        """Of this machine, as Ray's other nodes reach it. "" while no worker has started."""
        return self._run.address

    def restart(self) -> None:
        """Start Ray again. What it kept, and its workers, are gone."""
        self.close()
        self._run = self._start()

    def close(self) -> None:
        """End Ray if it was started here, and the courier. Returns when they are gone. May be called twice."""
        run = self._run
        with self._changed:
            run.ended = run.ended or "it was closed"
        with contextlib.suppress(OSError):  # closing it would leave the thread that reads it, and the pipe open
            run.socket.shutdown(socket.SHUT_RDWR)
        _let_go_of_lines(run)
        run.reader.join()

    def _start(self) -> _Run:
        settings = self._settings
        remove_leftovers()
        folder = make_folder()
        note_owner(folder)
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(True)  # whatever the default for new ones has been set to by others
        with theirs, open(folder / _LOG, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _COURIER, str(theirs.fileno())],
                env=_environment(folder, settings.is_local), pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        note_owner(folder, process.pid)
        connection = multiprocessing.connection.Connection(os.dup(ours.fileno()))
        run = _Run(folder, process, ours, connection, settings.store_bytes if settings.is_local else 0)
        package = "" if settings.is_local else str(copy_package(folder))
        limit_s = _START_LIMIT_S if settings.is_local else _JOIN_LIMIT_S
        self._send(run, protocol.StartRay(settings, str(folder / RAYS_OWN), limit_s, package))
        run.reader = threading.Thread(target=self._read, args=(run,), name="rayltx-answers", daemon=True)
        run.reader.start()
        threading.Thread(target=self._watch, args=(run,), name="rayltx-watch", daemon=True).start()
        return run

    def _end(self, run: _Run, reason: str) -> None:
        with self._changed:
            if run.ended is None:
                run.ended = reason
            reason = run.ended
            unanswered, run.answers = run.answers, {}
            for answer in unanswered.values():
                answer.end(failure=f"{RAY_ENDED}{reason}")
            self._changed.notify_all()
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(_CLOSE_S)
        end_session(run.process.pid)
        run.process.wait()
        with run.sending:  # another thread may be about to send
            run.connection.close()
            while run.lines:
                run.lines.popitem()[1].close()
        run.socket.close()
        remove_folder(run.folder)

    # ---- workers

    def start_worker(
        self,
        rank: int,
        num_ranks: int,
        arguments: tuple[object, ...],
        environment: Mapping[str, str],
        resources: Mapping[str, float],
    ) -> int:
        """Start a worker's process. Returns its number, while it comes up.

        rank, num_ranks: by which its machine is chosen where there are several. arguments: of `RayWorker`.
        """
        run, number = self._run, next(self._numbers)
        if self.shares_memory:
            arguments = (*arguments, self._begin_line(run, number))
        self._send(run, protocol.StartWorker(number, rank, num_ranks, arguments, environment, resources))
        return number

    def _begin_line(self, run: _Run, worker: int) -> str:
        """The path of a worker's line; "" where it can have none."""
        with run.sending:
            if run.ended is not None:
                return ""
            try:
                line = Line(worker, run.folder / f"line-{worker}")
            except OSError as error:
                logger.warning(
                    "steps go to a worker through Ray, as it can have no socket in %s: %s", run.folder, error
                )
                return ""
            run.lines[worker] = line
            return str(line.path)

    def end_worker(self, worker: int) -> None:
        """End a worker's process, whatever it is doing."""
        run = self._run
        if (line := run.lines.get(worker)) is not None:
            line.let_go()
        self._send(run, protocol.EndWorker(worker))

    def call(self, worker: int, asked: object) -> Answer:
        """Have a worker run a call after what it is doing. asked: a `Call`."""
        return self._call([worker], asked)[0]

    def call_each(self, workers: Sequence[int], asked: object, by_line: bool = False) -> list[Answer]:
        """Have several workers run the same call, which is pickled once. Returns an answer of each.

        by_line: the short way, where it can be had: for what is asked again and again.
        """
        return self._call(workers, asked, by_line=by_line)

    def call_and_keep(self, worker: int, asked: object) -> tuple[Answer, Kept]:
        """The same, with what the call gives kept in Ray's store; the answer says whether it gave it."""
        kept = Kept(self._run, next(self._numbers))
        return self._call([worker], asked, kept)[0], kept

    def _call(
        self, workers: Sequence[int], asked: object, keep_as: Kept | None = None, by_line: bool = False
    ) -> list[Answer]:
        run = self._run
        answers = [Answer(next(self._numbers), worker, asked=asked) for worker in workers]
        stale, payload, kept = self._dump(run, asked)
        with run.sending:
            with self._changed:
                reason = f"{RAY_ENDED}{run.ended}" if run.ended else "what Ray kept is gone" if stale else None
                is_small = not kept and keep_as is None and len(payload) <= MOST_BYTES
                lines = _idle_lines(run, workers) if by_line and is_small and reason is None else []
                serves = self._have_read(run, lines, answers)
                for answer in answers:
                    if reason is None:
                        run.answers[answer.call] = answer
                    else:
                        answer.end(failure=reason)
            if lines:
                self._send(run, *serves)
                for line in lines:
                    line.ask(payload)
            elif reason is None:
                calls = tuple((answer.call, worker) for answer, worker in zip(answers, workers))
                number = None if keep_as is None else keep_as.number
                self._ask_by_ray(run, workers, protocol.CallWorkers(calls, payload, kept, number))
        return answers

    def _have_read(self, run: _Run, lines: Sequence[Line], answers: Sequence[Answer]) -> list[protocol.Serve]:
        """Note which call has the worker read its line for each answer. Returns those calls that are to be sent first."""
        begun = []
        for line, answer in zip(lines, answers):
            if line.serve_call is None:
                line.serve_call = next(self._numbers)
                run.serving[line.serve_call] = line
                begun.append(protocol.Serve(line.serve_call, line.worker))
            answer.serve_call = line.serve_call
        return begun

    def _ask_by_ray(self, run: _Run, workers: Sequence[int], call: protocol.CallWorkers) -> None:
        for worker in workers:
            if (line := run.lines.get(worker)) is not None:
                line.call_back()
        self._send(run, call)

    def _dump(self, run: _Run, asked: object) -> tuple[bool, bytes, tuple[int, ...]]:
        payload, kept = dump_call(asked)
        for each in kept:
            if each.run is not run and each.source is not None:
                each.move(run, self._keep(run, each.source))
        return any(each.run is not run for each in kept), payload, tuple(each.number for each in kept)

    def keep(self, data: np.ndarray) -> Kept:
        """Put bytes into Ray's store."""
        run = self._run
        return Kept(run, self._keep(run, data), data)

    def _keep(self, run: _Run, data: np.ndarray) -> int:
        number = next(self._numbers)
        self._send(run, protocol.Keep(number, data.tobytes()))
        return number

    def wait(self, answers: Collection[Answer], timeout_s: float) -> list[Answer]:
        """Those that have come, as soon as one has; none when the time is over."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not (done := [answer for answer in answers if answer.is_done]):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
        return done

    # ---- the pipe

    def _send(self, run: _Run, *messages: object) -> None:
        """Send what is to be sent, and what nobody needs to be kept for any more."""
        released = []
        while run.released:
            released.append(run.released.popleft())
        try:
            with run.sending:
                for message in (*([protocol.LetGo(tuple(released))] if released else []), *messages):
                    run.connection.send(message)
        except (OSError, ValueError):  # the reading thread says why
            logger.debug("the courier is gone")

    def _watch(self, run: _Run) -> None:
        """End a courier that says nothing: neither what is being sent to it nor what is being read of it would come to an end."""
        silent_s, heard = 0.0, run.heard
        while run.ended is None and silent_s < _SILENT_S:
            time.sleep(_LOOK_S)
            # As counted here, which a process that was stopped itself does not do.
            silent_s, heard = (silent_s + _LOOK_S if run.heard == heard else 0.0), run.heard
            if silent_s >= _SILENT_S and (line := run.reading) is not None:
                line.let_go()  # it is a worker that stopped in the middle of an answer
                silent_s = 0.0
        if run.ended is None:
            run.stuck = f"its driver's process says nothing for {silent_s:.0f} s"
            run.process.kill()
            _let_go_of_lines(run)

    def _can_read(self, run: _Run) -> bool:
        """Wait for the courier, and take what comes by lines. Returns whether the courier says something."""
        for line in [line for line in list(run.lines.values()) if line.is_let_go]:
            while line.has_answer and self._read_line(run, line):
                pass
            with run.sending:
                run.lines.pop(line.worker).close()
        lines = {line.waits_for: line for line in list(run.lines.values())}
        ready = multiprocessing.connection.wait([run.connection, *lines], _LET_GO_S)
        for waited_for, line in lines.items():
            if waited_for in ready:
                self._read_line(run, line)
        return run.connection in ready

    def _read_line(self, run: _Run, line: Line) -> bool:
        """Returns whether there was something."""
        run.reading = line
        try:
            payload = line.read()
        except (EOFError, OSError) as error:
            if not line.is_let_go:
                logger.info("steps go to a worker through Ray, as its line ended: %s", error or type(error).__name__)
            line.let_go()  # Ray says why
            return False
        finally:
            run.reading = None
        if payload is None:
            return True  # the worker has come to it
        with self._changed:
            for answer in list(run.answers.values()):
                if answer.worker == line.worker and answer.serve_call is not None:
                    run.answers.pop(answer.call).end(payload)
            self._changed.notify_all()
        return True

    def _read(self, run: _Run) -> None:
        reason = ""
        try:
            while True:
                while not self._can_read(run):
                    if run.released:
                        self._send(run)
                message = run.connection.recv()
                run.heard += 1
                if isinstance(message, protocol.Running):
                    continue
                if isinstance(message, protocol.Ended):
                    reason = message.reason
                    continue  # until the courier has ended, with all that it started
                with self._changed:
                    if isinstance(message, protocol.Started):
                        run.store_bytes, run.address = message.store_bytes, message.address
                    elif (line := run.serving.pop(message.call, None)) is not None:
                        # An answer that the worker has given came before this: lines are read first.
                        is_lost = isinstance(message, protocol.NotAnswered)
                        if is_lost or line.serve_call == message.call:  # though nobody called it back
                            line.let_go()  # what comes by it still would be taken for another call's
                        _fail_by_line(run, message.call, message.reason if is_lost else _LINE_BROKE)
                    elif (answer := run.answers.pop(message.call, None)) is not None:
                        if isinstance(message, protocol.Answered):
                            answer.end(message.payload)
                        else:
                            answer.end(failure=message.reason)
                    self._changed.notify_all()
        except (EOFError, OSError):
            reason = reason or run.stuck
        except Exception as error:  # nobody would wait for an answer in vain
            logger.exception("what came from the courier cannot be read")
            reason = f"what came from its driver cannot be read ({error})"
        if not reason:
            said = _last_line(run.folder / _LOG)
            reason = "its driver's process ended" + (f", after it said: {said}" if said else "")
        if run.ended is None:
            logger.warning("%s%s", RAY_ENDED, reason)
        self._end(run, reason)


def _let_go_of_lines(run: _Run) -> None:
    """The thread that reads may be waiting for the rest of an answer, of a worker that was stopped in the middle of it."""
    for line in list(run.lines.values()):
        line.let_go()


def _idle_lines(run: _Run, workers: Sequence[int]) -> list[Line]:
    """Of these workers, if all have one, and nothing to do: their sockets are empty then. Else none."""
    lines = [line for worker in workers if (line := run.lines.get(worker)) is not None and line.is_up]
    is_idle = not any(answer.worker in workers for answer in run.answers.values())
    return lines if is_idle and len(lines) == len(workers) else []


def _fail_by_line(run: _Run, serve_call: int, reason: str) -> None:
    """What was asked by a line that the worker reads no more has no answer."""
    for answer in list(run.answers.values()):
        if answer.serve_call == serve_call:
            run.answers.pop(answer.call).end(failure=reason)


def _environment(folder: Path, is_local: bool) -> dict[str, str]:
    """The courier's, of which Ray's processes and the workers inherit."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    environment["PYTHONPATH"] = python_path()
    # Under `uv run` Ray would send the working directory to its workers, and start them through uv.
    environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    environment["RAY_worker_niceness"] = "0"  # added to this process's own
    environment["RAY_worker_maximum_startup_concurrency"] = "16"  # otherwise as many as Ray believes to have CPUs
    if is_local:
        token = folder / "token"
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN_PATH"] = "token", str(token)
        environment.pop("RAY_AUTH_TOKEN", None)
    return environment


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""
    return ""
