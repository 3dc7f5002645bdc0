"""Two machines as far as Ray can tell: two network namespaces with a cable between them, and a node of Ray in each."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_ADDRESSES = ("10.213.77.1", "10.213.77.2")
_PORT = 6379


class NotHere(Exception):
    """Why there can be no two machines here."""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _end_all(name: str) -> None:
    """Ray's processes have sessions of their own: only the namespace tells whose they are."""
    while pids := subprocess.run(
        ["ip", "netns", "pids", name], capture_output=True, text=True, check=True
    ).stdout.split():
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)


@dataclass
class Machines:
    names: tuple[str, str]  # of the namespaces
    environment: dict[str, str]
    address = f"{_ADDRESSES[0]}:{_PORT}"

    def run(self, code: str, *arguments: str, stderr: IO[bytes] | None = None) -> subprocess.Popen[str]:
        """Python on the first machine, with pipes."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[0], sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **self.environment},
            start_new_session=True, stderr=stderr,
        )  # fmt: skip

    def kill_second(self) -> None:
        """All its processes: a machine that loses power says no less."""
        _end_all(self.names[1])

    def cut(self) -> None:
        """Take the cable out: nothing arrives any more, not even that something ended."""
        _ip("-n", self.names[1], "link", "set", "cable", "down")


@contextlib.contextmanager
def two_machines() -> Iterator[Machines]:
    """Raises NotHere."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        raise NotHere("needs root, and iproute2, for network namespaces")
    names = (f"rayltx{os.getpid()}a", f"rayltx{os.getpid()}b")
    nodes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        made = []
        try:
            for name in names:
                added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
                if added.returncode != 0:
                    raise NotHere(f"no network namespaces here: {added.stderr.strip()}")
                made.append(name)
            _ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, _ADDRESSES):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "cable", "up")
                _ip("-n", name, "link", "set", "lo", "up")
            for name, address in zip(names, _ADDRESSES):
                nodes.append(_start_node(name, address, folder, environment))
            yield Machines(names, environment)
        finally:
            for name in made:
                _end_all(name)
                _ip("netns", "del", name)
            for node in nodes:
                node.wait()


def _start_node(name: str, address: str, folder: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    is_first = address == _ADDRESSES[0]
    where = ["--head", f"--port={_PORT}", f"--temp-dir={folder}/t", "--include-dashboard=false"]
    arguments = where if is_first else [f"--address={_ADDRESSES[0]}:{_PORT}"]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = open(f"{folder}/{name}.log", "wb")  # noqa: SIM115  # the node's for as long as it runs
    with log:
        node = subprocess.Popen(
            ["ip", "netns", "exec", name, str(Path(sys.executable).with_name("ray")), "start", *arguments, "--block",
             f"--node-ip-address={address}", "--num-cpus=2", f"--object-store-memory={200 * 2**20}"],
            env={**inherited, **environment}, start_new_session=True, cwd=folder, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log,
        )  # fmt: skip
    _wait_for_line(node, Path(log.name), "Ray runtime started")
    return node


def _wait_for_line(node: subprocess.Popen[bytes], log: Path, line: str) -> None:
    while line not in (said := log.read_text(errors="replace")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(0.2)
            raise RuntimeError(f"Ray did not start: {said}")
