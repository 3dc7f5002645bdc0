"""The processes and files of one run of Ray, told from all others: they are in the courier's session, and its folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from rayltx.errors import DeviceError

_PREFIX = "rayltx-"
_OWNER = "owner.json"
RAYS_OWN = "ray"  # the part of the folder that Ray opens to all users, which its place in ours closes
# Ray adds a session's name and a socket's to its folder, and a socket's path has at most 107 bytes.
_LONGEST_FOLDER = 38
_LEAST_FREE_BYTES = 64 * 2**20  # at its start
_LEAST_LEFT_BYTES = 8 * 2**20  # while it runs
_GRACE_S = 2.0


def processes_of(session: int) -> list[psutil.Process]:
    """The processes of a session (setsid(2)), but for this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if process.pid != os.getpid() and os.getsid(process.pid) == session:
                found.append(process)
    return found


def end_session(session: int) -> None:
    """End the processes of a session, but for this one, and wait for that."""
    deadline = time.monotonic() + _GRACE_S
    while processes := processes_of(session):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=max(0.0, deadline - time.monotonic()))
        if time.monotonic() > deadline:
            return


def _places() -> list[str]:
    """Where the folder of a run can be, the best first."""
    return list(dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")))


def make_folder() -> Path:
    """A folder for one run's files, that no other user can read.

    Raises DeviceError where there is no place for one.
    """
    told = []
    for place in _places():
        length = len(os.fsencode(place)) + 1 + len(_PREFIX) + 8
        if length > _LONGEST_FOLDER or not place.isascii():
            told.append(f"{place}: Ray's sockets need a path of ASCII letters, at most {_LONGEST_FOLDER} of them")
            continue
        try:
            free = shutil.disk_usage(place).free
            if free < _LEAST_FREE_BYTES:
                told.append(f"{place}: {free / 2**20:.0f} MiB are free, Ray needs {_LEAST_FREE_BYTES / 2**20:.0f}")
                continue
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        except OSError as error:
            told.append(f"{place}: {error.strerror}")
    raise DeviceError(
        f"no place for Ray's own files: {'; '.join(told)}. Set TMPDIR to a folder that is short and has room"
    )


def has_room(folder: Path) -> bool:
    """Whether Ray can go on writing into its folder."""
    return folder.exists() and shutil.disk_usage(folder).free >= _LEAST_LEFT_BYTES


def note_owner(folder: Path, session: int = 0) -> None:
    """Write down whose a folder is: this process's, which has started a session, or is about to."""
    record = {"pid": os.getpid(), "started": _started(os.getpid()), "session": session, **_where()}
    (folder / _OWNER).write_text(json.dumps(record))


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did: the clock can be set. "" for one that is not there."""
    with contextlib.suppress(OSError, IndexError):
        # After the name, which is in parentheses and can be anything: see proc_pid_stat(5).
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _where() -> dict[str, str]:
    """In which life of this machine, and by which count of processes: that of a container is its own."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers() -> None:
    """Remove the folders of runs whose process is gone, and end what is left of them. Only this user's."""
    here = _where()
    for folder, owner in _folders():
        if owner["boot"] == here["boot"]:
            if owner["namespace"] != here["namespace"] or _started(int(owner["pid"])) == owner["started"]:
                continue
        for process in processes_of(int(owner["session"])):
            if _writes_into(process, folder):  # a session's number may have been given to others since
                with contextlib.suppress(psutil.Error):
                    process.kill()
        remove_folder(folder)


def _folders() -> Iterator[tuple[Path, dict[str, Any]]]:
    for place in _places():
        for folder in Path(place).glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                    continue
                owner = json.loads((folder / _OWNER).read_text())
                yield folder, {name: owner[name] for name in ("pid", "started", "session", "boot", "namespace")}


def _writes_into(process: psutil.Process, folder: Path) -> bool:
    """Whether a file that it has open, or its arguments, are of a folder. Ray's processes overwrite their arguments."""
    told = []
    with contextlib.suppress(OSError, psutil.Error):
        told += process.cmdline()
        for descriptor in os.listdir(f"/proc/{process.pid}/fd"):
            with contextlib.suppress(OSError):
                told.append(os.readlink(f"/proc/{process.pid}/fd/{descriptor}"))
    return any(str(folder) in text for text in told)
