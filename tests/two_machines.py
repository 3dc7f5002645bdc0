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
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rayltx.about import ROOT

_ADDRESSES = ("10.213.77.1", "10.213.77.2")
_PORT = 6379
_LIMIT_S = 400.0


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


# Says what it does, and goes on when told to.
STEPS = f"""
import sys; sys.path.insert(0, {str(ROOT / "importable")!r})
import time, logging
logging.basicConfig(level=logging.WARNING)
import torch
from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.exactness import Case, untouched_forward, worst_error
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.sequence_parallel.partition import ParallelConfig

TWO = ParallelConfig(1, 2)
path, address, then = sys.argv[1:]
untouched = save_tiny_checkpoint(path, "LTX-Video")
checkpoint = open_checkpoint(path)
made = DiffusersModel.of_checkpoint(checkpoint)
inputs = Case("long", shape=LatentShape(16, 32, 32)).inputs(made)

class Cancelled(Exception):
    pass

with Cluster.start(ClusterRequest(workers=2, address=address)) as cluster:
    remote = cluster.load(checkpoint, made)
    reference = remote.forward(inputs, TWO)["video"]
    print("error", worst_error({{"video": reference}}, untouched_forward(untouched, made, inputs)), flush=True)
    first = [info.pid for info in cluster.workers()]
    started = time.monotonic()
    remote.forward(inputs, TWO)
    usual = time.monotonic() - started
    told = []

    def poll():
        if not told:  # in the first block: nothing has to be exchanged in the end of a step
            told.append(True)
            if then == "cancel":
                raise Cancelled
            print("now", flush=True)
            sys.stdin.readline()

    started = time.monotonic()
    try:
        answer = remote.forward(inputs, TWO, poll=poll)["video"]
    except Cancelled:
        answer = remote.forward(inputs, TWO)["video"]
    print("lost", time.monotonic() - started - usual, flush=True)
    kept = sum(info.pid in first for info in cluster.workers())
    print("equal", torch.equal(answer, reference), kept, flush=True)
    print("equal", torch.equal(remote.forward(inputs, TWO)["video"], reference), flush=True)
"""


@dataclass
class Steps:
    """What became of steps that two machines share, of which one was disturbed."""

    error: float  # of an undisturbed one, against diffusers' model
    lost_s: float
    is_equal: bool
    num_kept: int  # workers
    next_is_equal: bool
    log: str

    @classmethod
    def disturbed(cls, machines: Machines, folder: Path, then: str) -> Steps:
        """then: "cancel", or what happens to the second machine in a step's first block: "kill" or "cut"."""
        with open(folder / "log", "wb") as log:
            process = machines.run(STEPS, str(folder / "model.safetensors"), machines.address, then, stderr=log)
        limit = threading.Timer(_LIMIT_S, process.kill)  # of one that hangs, whose lines are waited for
        limit.start()
        try:
            error = float(_told(process, "error")[0])
            if then != "cancel":
                _told(process, "now")
                machines.kill_second() if then == "kill" else machines.cut()
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            lost_s = float(_told(process, "lost")[0])
            equal, kept = _told(process, "equal")
            next_equal = _told(process, "equal")[0]
            assert process.wait() == 0
        finally:
            limit.cancel()
        return cls(error, lost_s, equal == "True", int(kept), next_equal == "True", (folder / "log").read_text())


def _told(process: subprocess.Popen[str], word: str) -> list[str]:
    assert process.stdout is not None
    line = next((line for line in process.stdout if line.startswith(word)), "")
    assert line, f"it ended ({process.wait()}) before it said {word}"
    return line.split()[1:]
