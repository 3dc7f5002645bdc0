"""What a worker is doing, for the log: written by the worker when it is sent a signal, even while it is stuck."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from pathlib import Path

STACK_SIGNAL = signal.SIGUSR1


def write_stacks_into(folder: str) -> None:
    """From now on, at the signal. Python's own handler writes it, which needs no thread to go on."""
    file = open(_path(Path(folder), os.getpid()), "w")  # noqa: SIM115  # for as long as this process lives
    faulthandler.register(STACK_SIGNAL, file=file, all_threads=False)


def stack_of(folder: Path, pid: int) -> str:
    """What a worker has written; "" where there is nothing."""
    with contextlib.suppress(OSError):
        return _path(folder, pid).read_text().strip()
    return ""


def _path(folder: Path, pid: int) -> Path:
    return folder / f"stack-{pid}"
