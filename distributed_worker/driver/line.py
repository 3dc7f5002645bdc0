"""The short way to a worker of this machine: a socket between it and ComfyUI's process, beside the courier and Ray.

A call through Ray passes four processes, which takes longer than the rest of a small step. So a worker that is to run steps is
told, through Ray, to read its line: a call of `RayWorker.serve`, which goes on until it reads that it is to come back. What is
asked through the line meanwhile and what is asked through Ray afterwards are so run in the order in which they were asked, all
by one thread; and that the worker's process has ended, Ray says of the call that was to go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

logger = logging.getLogger(__name__)

# What a socket takes whatever its reader does (net.core.wmem_default is 208 KiB, of which a part is the kernel's own): who sends
# is never kept waiting. Larger calls go through Ray.
MOST_BYTES = 64 * 2**10
_COME_BACK = b""


class Line:
    """The end of ComfyUI's process, of one worker's line."""

    def __init__(self, worker: int, path: Path) -> None:
        """path: of a socket that does not exist yet. Raises OSError where it cannot be."""
        self.worker, self.path = worker, path
        self.serve_call: int | None = None  # that has the worker read it, until it is called back
        self.is_let_go = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._end: socket.socket | None = None
        self._ending = threading.Lock()  # nobody shuts a descriptor down that has been given to another
        self._connection: Connection | None = None  # on the same end
        try:
            self._listener.bind(str(path))
            self._listener.listen(1)
        except OSError:
            self._listener.close()
            raise

    @property
    def is_up(self) -> bool:
        """Whether the worker has come to it."""
        return self._connection is not None and not self.is_let_go

    @property
    def waits_for(self) -> Connection | socket.socket:
        """What becomes readable when `read` has something to do."""
        return self._connection or self._listener

    @property
    def has_answer(self) -> bool:
        return self._connection is not None and self._connection.poll(0)

    def ask(self, payload: bytes) -> None:
        """Send a call to a worker that reads its line. At most `MOST_BYTES`."""
        self._send(payload)

    def call_back(self) -> None:
        """The worker is to read no further, if it does."""
        if self.serve_call is not None:
            self.serve_call = None
            self._send(_COME_BACK)

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the worker is gone, which Ray says
            if self._connection is not None:
                self._connection.send_bytes(data)

    def read(self) -> bytes | None:
        """An answer, where there is one. Raises EOFError or OSError when the worker is gone, or the line is let go of."""
        if self._connection is None:
            self._end, _ = self._listener.accept()
            self._end.setblocking(True)
            self._end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MOST_BYTES)
            self._connection = Connection(os.dup(self._end.fileno()))
            return None
        return self._connection.recv_bytes()

    def let_go(self) -> None:
        """From any thread: who reads the line, or waits for the rest of an answer, finds its end; the worker as well."""
        self.is_let_go = True
        with self._ending, contextlib.suppress(OSError):
            if self._end is not None:
                self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """By who reads it: nobody may wait for what is closed."""
        self.let_go()
        with self._ending:
            for each in (self._listener, self._end, self._connection):
                if each is not None:
                    each.close()
        with contextlib.suppress(OSError):  # it goes with its folder
            self.path.unlink()


class WorkerLine:
    """The worker's end."""

    def __init__(self, path: str) -> None:
        """Raises OSError where there is no such line."""
        with socket.socket(socket.AF_UNIX) as end:
            end.setblocking(True)
            end.connect(path)
            self._connection = Connection(end.detach())

    @classmethod
    def to(cls, path: str) -> WorkerLine | None:
        """None where there is no such line: what is asked comes by Ray."""
        try:
            return cls(path) if path else None
        except OSError as error:
            logger.warning("no line to ComfyUI's process (%s): steps come by Ray", error)
            return None

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """Answer what is asked until called back, or until the other end is gone."""
        with contextlib.suppress(EOFError, OSError):
            while (payload := self._connection.recv_bytes()) != _COME_BACK:
                self._connection.send_bytes(answer(payload))
