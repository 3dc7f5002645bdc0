"""A place in ComfyUI's process where ranks of several machines meet: the store of their group, and the numbers of their steps.

torch's own server for groups (TCPStore) listens on all interfaces and asks for no password. This one listens at one address, and
each side proves to the other that it knows a secret (`multiprocessing.connection`'s challenge), before anything else is read. The
secret reaches the ranks through Ray.
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
import struct
import threading
import time
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import torch.distributed as dist

from rayltx.distributed_worker.step_control import StepControl
from rayltx.errors import DeviceError, RanksDisagree, StepCancelled

logger = logging.getLogger(__name__)

_PROVE_S = 10.0  # that a visitor has to show that it knows the secret
_LOOK_AGAIN_S = 0.01
_GONE = "the place in ComfyUI's process where the ranks meet cannot be reached"


@dataclass(frozen=True)
class Place:
    """Where a server is, and what it takes to be let in."""

    host: str
    port: int
    secret: bytes

    def connect(self, timeout_s: float = 30.0) -> Connection:
        """Raises RuntimeError where nobody answers, or somebody without the secret does."""
        try:
            connected = socket.create_connection((self.host, self.port), timeout_s)
            _send_at_once(connected)
            connected.settimeout(None)
            _limit_reading(connected, timeout_s)
            connection = Connection(os.dup(connected.fileno()))
            answer_challenge(connection, self.secret)
            deliver_challenge(connection, self.secret)
            _limit_reading(connected, 0.0)
            connected.close()
        except (OSError, EOFError, multiprocessing.AuthenticationError) as error:
            raise RuntimeError(f"{_GONE}: {self.host}:{self.port}: {error}") from error
        return connection


def _send_at_once(connected: socket.socket) -> None:
    """Messages are small, and each is waited for."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _limit_reading(connected: socket.socket, limit_s: float) -> None:
    """0: no limit. Python's own limit would make the descriptor one that `Connection` cannot read."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(limit_s), 0))


# ---- in ComfyUI's process


class MeetingServer:
    """Raises DeviceError for an address that it cannot have. Port 0: a free one."""

    def __init__(self, host: str, port: int = 0) -> None:
        try:
            self._socket = socket.create_server((host, port))
        except (OSError, OverflowError) as error:
            raise DeviceError(
                f"the workers cannot meet at {host}:{port}: {error}; choose an address of this machine and a free port, or auto"
            ) from error
        self.place = Place(host, self._socket.getsockname()[1], secrets.token_bytes(32))
        self._numbers = itertools.count()
        self._changing = threading.Lock()
        self._keys: dict[str, bytes] = {}
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
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # closing it would leave the thread that accepts, and the port open
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connected,), name="rayltx-visitor", daemon=True).start()

    def _serve(self, connected: socket.socket) -> None:
        with connected:
            _send_at_once(connected)
            _limit_reading(connected, _PROVE_S)
            connection = Connection(os.dup(connected.fileno()))
            try:
                deliver_challenge(connection, self.place.secret)
                answer_challenge(connection, self.place.secret)
                _limit_reading(connected, 0.0)
                while True:
                    name, *arguments = connection.recv()
                    connection.send(getattr(self, f"_on_{name}")(*arguments))
            except (EOFError, OSError):
                pass  # it is gone, or never was one of ours
            except (multiprocessing.AuthenticationError, AssertionError):  # what is no challenge is an AssertionError
                logger.warning("somebody without the secret came to where the ranks meet")
            finally:
                connection.close()

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
            return error
        return None

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
    """A group's store. Who makes a group keeps this object for as long as the group is: torch does not."""

    def __init__(self, place: Place, group: str, timeout_s: float) -> None:
        super().__init__()
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

    def clone(self) -> ServedStore:
        return ServedStore(self._place, self._group, self._timeout_s)

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

    def abort(self) -> None:
        """See `StepControl.abort`."""
        self._visit.ask("abort", self._number)
