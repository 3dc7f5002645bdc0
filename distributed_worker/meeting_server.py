"""A place in ComfyUI's process where ranks of several machines meet: the store of their group, and the numbers of their steps.

torch's own server for groups (TCPStore) listens on all interfaces and asks for no password. This one listens at one address, and
each side proves to the other that it knows a secret (`multiprocessing.connection`'s challenge), before anything else is read. The
secret reaches the ranks through Ray. Who sits between two machines could still change what passes by.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import multiprocessing
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import torch.distributed as dist

from rayltx.distributed_worker.driver.deadline import called_after
from rayltx.distributed_worker.step_control import StepControl
from rayltx.errors import DeviceError, RanksDisagree, StepCancelled

logger = logging.getLogger(__name__)

_PROVE_S = 10.0  # that a visitor has to show that it knows the secret
_MOST_UNPROVEN = 32  # visitors at a time
_SILENT_S = 30  # after which the other machine is taken for gone: it answers probes, whatever its processes do
_LOOK_AGAIN_S = 0.01
_ACCEPT_AGAIN_S = 0.2
_ALL_ADDRESSES = ("", "0.0.0.0", "::")
_GONE = "the place in ComfyUI's process where the ranks meet cannot be reached"


@dataclass(frozen=True)
class Place:
    """Where a server is, and what it takes to be let in."""

    host: str
    port: int
    secret: bytes = field(repr=False)

    def connect(self, timeout_s: float = 30.0) -> Connection:
        """Raises RuntimeError where nobody answers, or somebody without the secret does."""
        try:
            with socket.create_connection((self.host, self.port), timeout_s) as connected:
                _prepare(connected)
                connection = Connection(os.dup(connected.fileno()))
                with called_after(timeout_s, _shut, connected):
                    answer_challenge(connection, self.secret)
                    deliver_challenge(connection, self.secret)
        except (OSError, EOFError, multiprocessing.AuthenticationError) as error:
            raise RuntimeError(f"{_GONE}: {self.host}:{self.port}: {error}") from error
        return connection


def _prepare(connected: socket.socket) -> None:
    """Messages are small, and each is waited for; and a machine that is gone says nothing."""
    connected.settimeout(None)  # of Python's, with which `Connection` cannot read
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": _SILENT_S // 3, "TCP_KEEPINTVL": _SILENT_S // 6, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 1000 * _SILENT_S,
    }  # fmt: skip
    for name, value in options.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _shut(connected: socket.socket) -> None:
    """Closing it would leave the thread that waits for it, and the port open."""
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


# ---- in ComfyUI's process


class MeetingServer:
    """Raises DeviceError for an address that it cannot have, or that ranks could not reach it at. Port 0: a free one."""

    def __init__(self, host: str, port: int = 0) -> None:
        if host in _ALL_ADDRESSES:
            raise DeviceError(
                f"the workers cannot meet at {host or 'no address'}: it has to be one that each of them reaches this machine at; "
                "name it, or choose auto"
            )
        try:
            self._socket = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except (OSError, OverflowError) as error:
            raise DeviceError(
                f"the workers cannot meet at {host}:{port}: {error}; choose an address of this machine and a free port, or auto"
            ) from error
        self.place = Place(host, self._socket.getsockname()[1], secrets.token_bytes(32))
        self._numbers = itertools.count()
        self._changing = threading.Lock()
        self._keys: dict[str, bytes] = {}
        self._is_closed = False
        self._unproven = threading.BoundedSemaphore(_MOST_UNPROVEN)
        self._visitors: set[socket.socket] = set()
        self._controls: weakref.WeakValueDictionary[int, StepControl] = weakref.WeakValueDictionary()
        threading.Thread(target=self._accept, name="rayltx-meeting", daemon=True).start()

    def begin_group(self) -> str:
        """What the keys of a new group begin with. Those of earlier ones are forgotten."""
        with self._changing:
            self._keys.clear()
        return f"group-{next(self._numbers)}"

    def share(self, control: StepControl) -> ServedControl:
        """How ranks see the numbers of a step. They are there for as long as `control` is."""
        number = next(self._numbers)
        self._controls[number] = control
        return ServedControl(self.place, number)

    def close(self) -> None:
        """Send all away: none waits for a step any more."""
        self._is_closed = True
        _shut(self._socket)
        self._socket.close()
        with self._changing:
            for control in self._controls.values():
                control.abort()
            for visitor in self._visitors:
                _shut(visitor)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connected, _ = self._socket.accept()
            except OSError as error:
                if not self._is_closed:  # no descriptors are left, or who came is gone
                    logger.warning("where the ranks meet: %s", error)
                    time.sleep(_ACCEPT_AGAIN_S)
                continue
            self._unproven.acquire()
            threading.Thread(target=self._receive, args=(connected,), name="rayltx-visitor", daemon=True).start()

    def _receive(self, connected: socket.socket) -> None:
        with connected:
            try:
                with self._connected_to(connected) as connection:
                    self._serve(connection)
            except (EOFError, OSError):
                pass  # it is gone, or never was one of ours
            except (multiprocessing.AuthenticationError, AssertionError, ValueError):
                # What is no challenge is an AssertionError.
                logger.warning("somebody without the secret came to where the ranks meet")

    @contextlib.contextmanager
    def _connected_to(self, connected: socket.socket) -> Iterator[Connection]:
        """A visitor who has shown that it knows the secret. Raises what the challenge raises."""
        try:
            _prepare(connected)
            connection = Connection(os.dup(connected.fileno()))
            with called_after(_PROVE_S, _shut, connected):  # however little comes at a time
                deliver_challenge(connection, self.place.secret)
                answer_challenge(connection, self.place.secret)
        finally:
            self._unproven.release()
        with self._changing:
            self._visitors.add(connected)
        try:
            if self._is_closed:
                raise EOFError("the server was closed")
            yield connection
        finally:
            with self._changing:
                self._visitors.discard(connected)
            connection.close()

    def _serve(self, connection: Connection) -> None:
        while True:
            name, *arguments = connection.recv()
            connection.send(getattr(self, f"_on_{name}")(*arguments))

    # What is asked: by `ServedStore` and `ServedControl`, which say what it means.

    def _on_set(self, key: str, value: bytes) -> None:
        with self._changing:
            self._keys[key] = value

    def _on_get(self, keys: list[str]) -> list[bytes | None]:
        with self._changing:
            return [self._keys.get(key) for key in keys]

    def _on_add(self, key: str, amount: int) -> int:
        with self._changing:
            value = int(self._keys.get(key, b"0")) + amount
            self._keys[key] = str(value).encode()
            return value

    def _on_exchange(self, key: str, expected: bytes, desired: bytes) -> bytes:
        with self._changing:
            if self._keys.get(key, b"" if not expected else None) == expected:
                self._keys[key] = desired
            return self._keys.get(key, expected)

    def _on_count(self, prefix: str) -> int:
        with self._changing:
            return sum(key.startswith(prefix) for key in self._keys)

    def _on_delete(self, key: str) -> bool:
        with self._changing:
            return self._keys.pop(key, None) is not None

    def _on_block(self, number: int, rank: int) -> Exception | None:
        control = self._controls.get(number)
        if control is None:
            return RanksDisagree("nobody waits for this step any more")
        try:
            control.at_block(rank)
        except (StepCancelled, RanksDisagree) as error:
            # Without what has `control`, for as long as the thread that answers has the error.
            return error.with_traceback(None)
        return None

    def _on_end(self, number: int, rank: int) -> None:
        if (control := self._controls.get(number)) is not None:
            control.at_end(rank)

    def _on_abort(self, number: int) -> None:
        if (control := self._controls.get(number)) is not None:
            control.abort()


# ---- in a worker


class _Visit:
    """A connection that is made when it is needed, for one thread at a time."""

    def __init__(self, place: Place) -> None:
        self._place, self._turn = place, threading.Lock()
        self._connection: Connection | None = None

    def ask(self, *message: object) -> object:
        """Raises RuntimeError when the other end is gone."""
        with self._turn:
            if self._connection is None:
                self._connection = self._place.connect()
            try:
                self._connection.send(message)
                return self._connection.recv()
            except (EOFError, OSError) as error:
                raise RuntimeError(f"{_GONE}: {self._place.host}:{self._place.port}: {error}") from error


class ServedStore(dist.Store):
    """A group's store. Who makes a group keeps this object for as long as the group is: torch does not.

    torch calls some methods by its own names, which are not those that it has in Python.
    """

    def __init__(self, place: Place, group: str, timeout_s: float) -> None:
        super().__init__()
        self._clones: list[ServedStore] = []  # which torch does not keep either
        self._place, self._group, self._timeout_s = place, group, timeout_s
        self._visit = _Visit(place)

    def _key(self, key: str) -> str:
        return f"{self._group}/{key}"

    def set(self, key: str, value: str | bytes) -> None:
        self._visit.ask("set", self._key(key), value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._get([key])[0]  # type: ignore[return-value]  # it is there

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """Raises RuntimeError when the time is over."""
        limit_s = self._timeout_s if timeout is None else timeout.total_seconds()
        until = time.monotonic() + limit_s
        while None in (found := self._get(keys)):
            if time.monotonic() > until:
                missing = [key for key, value in zip(keys, found) if value is None]
                raise RuntimeError(f"no rank said {', '.join(missing)} within {limit_s:.0f} s")
            time.sleep(_LOOK_AGAIN_S)

    def check(self, keys: list[str]) -> bool:
        return None not in self._get(keys)

    def add(self, key: str, amount: int) -> int:
        return self._visit.ask("add", self._key(key), amount)  # type: ignore[return-value]

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        told = [value.encode() if isinstance(value, str) else bytes(value) for value in (expected, desired)]
        return self._visit.ask("exchange", self._key(key), *told)  # type: ignore[return-value]

    def delete_key(self, key: str) -> bool:
        return self._visit.ask("delete", self._key(key))  # type: ignore[return-value]

    deleteKey = delete_key  # noqa: N815

    def num_keys(self) -> int:
        return self._visit.ask("count", self._key(""))  # type: ignore[return-value]

    getNumKeys = num_keys  # noqa: N815

    def clone(self) -> ServedStore:
        self._clones.append(ServedStore(self._place, self._group, self._timeout_s))
        return self._clones[-1]

    def _get(self, keys: list[str]) -> list[bytes | None]:
        return self._visit.ask("get", [self._key(key) for key in keys])  # type: ignore[return-value]


class ServedControl:
    """A `StepControl` as ranks on other machines see it: a message there and back at each block."""

    def __init__(self, place: Place, number: int) -> None:
        self._place, self._number = place, number
        self._visit = _Visit(place)

    def __getstate__(self) -> tuple[Place, int]:
        return self._place, self._number

    def __setstate__(self, state: tuple[Place, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def at_block(self, rank: int) -> None:
        """See `StepControl.at_block`."""
        said = self._visit.ask("block", self._number, rank)
        if isinstance(said, Exception):
            raise said

    def at_end(self, rank: int) -> None:
        """See `StepControl.at_end`."""
        if rank == 0:
            self._visit.ask("end", self._number, rank)

    def abort(self) -> None:
        """See `StepControl.abort`."""
        self._visit.ask("abort", self._number)
