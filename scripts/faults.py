"""Breaks running workers in every way that one machine allows, and writes the table of `docs/reliability.md`.

    PYTHON scripts/faults.py [--times 1] [--only WORD] [--write docs/reliability.md]

Two CPU ranks run steps of some seconds on a small model. A fault comes in the middle of one; the step's answer is then compared,
bit by bit, with an undisturbed one, and the next step's too. "Lost" is what the step took more than an undisturbed one. "Left"
counts processes and folders of the Ray that was lost. Some ten minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from page_tables import row, write_table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "importable"))

import psutil  # noqa: E402
import torch  # noqa: E402

from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint  # noqa: E402
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel  # noqa: E402
from rayltx.diffusion_models.lightricks.exactness import Case  # noqa: E402
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape  # noqa: E402
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint  # noqa: E402
from rayltx.distributed_worker.cluster import Cluster  # noqa: E402
from rayltx.distributed_worker.driver.processes import processes_of  # noqa: E402
from rayltx.distributed_worker.remote_model import RemoteModel  # noqa: E402
from rayltx.distributed_worker.request import ClusterRequest  # noqa: E402
from rayltx.sequence_parallel.partition import ParallelConfig  # noqa: E402

TWO = ParallelConfig(2, 1)
SHAPE = LatentShape(16, 32, 32)  # 16384 tokens: seconds a step
WITHIN_S = 10.0  # of the end of a process, in which nothing of it may be left


class Cancelled(Exception):
    pass


@dataclass
class Subject:
    """What faults are done to."""

    cluster: Cluster
    remote: RemoteModel
    inputs: dict
    usual_s: float = 0.0  # of a step

    def step(self, fault: Callable[[], None] | None = None) -> tuple[torch.Tensor, float]:
        """The answer and the seconds of a step, in whose middle something happens."""
        started, done = time.monotonic(), []

        def poll() -> None:
            if fault is not None and not done and time.monotonic() - started > 0.4 * self.usual_s:
                done.append(True)
                fault()

        answer = self.remote.forward(self.inputs, TWO, poll=poll)
        assert fault is None or done, "the step was faster than the fault"
        return answer["video"], time.monotonic() - started

    def rank(self, number: int) -> int:
        return self.cluster.workers()[number].pid

    def process(self, name: str) -> int:
        return next(process.pid for process in processes_of(self.cluster.driver.session) if name in process.name())


def kill(find: Callable[[Subject], list[int]], number: int = signal.SIGKILL) -> Callable[[Subject], Callable[[], None]]:
    def prepare(subject: Subject) -> Callable[[], None]:
        pids = find(subject)

        def fault() -> None:
            for pid in pids:
                os.kill(pid, number)

        return fault

    return prepare


FAULTS = {
    "SIGKILL of rank 0": kill(lambda subject: [subject.rank(0)]),
    "SIGKILL of rank 1": kill(lambda subject: [subject.rank(1)]),
    "SIGKILL of both ranks": kill(lambda subject: [subject.rank(0), subject.rank(1)]),
    "SIGSEGV of rank 1": kill(lambda subject: [subject.rank(1)], signal.SIGSEGV),
    "SIGTERM of rank 1": kill(lambda subject: [subject.rank(1)], signal.SIGTERM),
    "SIGSTOP of rank 1": kill(lambda subject: [subject.rank(1)], signal.SIGSTOP),
    "SIGSTOP of rank 0": kill(lambda subject: [subject.rank(0)], signal.SIGSTOP),
    "SIGKILL of the raylet": kill(lambda subject: [subject.process("raylet")]),
    "SIGKILL of the GCS": kill(lambda subject: [subject.process("gcs_server")]),
    "SIGKILL of Ray's driver (the courier)": kill(lambda subject: [subject.cluster.driver.session]),
}


def fault_rows(subject: Subject, times: int, only: str) -> list[str]:
    reference, usual = subject.step()
    usual = subject.usual_s = statistics.median([usual, *(subject.step()[1] for _ in range(2))])
    print(f"a step takes {usual:.1f} s", file=sys.stderr, flush=True)
    rows = []
    for name, prepare in FAULTS.items():
        if only and only not in name:
            continue
        survived, lost, left, alike = 0, [], 0, 0
        for _ in range(times):
            session, folder = subject.cluster.driver.session, subject.cluster.driver.folder
            answer, seconds = subject.step(prepare(subject))
            survived += torch.equal(answer, reference)
            lost.append(seconds - usual)
            if subject.cluster.driver.session != session:
                left += len(processes_of(session)) + folder.exists()
            alike += torch.equal(subject.step()[0], reference)
        rows.append(row(name, times, f"{survived}", f"{statistics.median(lost):.0f} s", str(left), f"{alike} equal"))
        print(rows[-1], file=sys.stderr, flush=True)
    if not only or only in "cancel":
        rows.append(_cancels(subject, reference))
    return rows


def _cancels(subject: Subject, reference: torch.Tensor, times: int = 20) -> str:
    """At moments spread over a step, each followed at once by a run."""
    usual = subject.usual_s
    waited, alike, pids = [], 0, [subject.rank(0), subject.rank(1)]
    for number in range(times):
        started, moment = time.monotonic(), usual * (number + 0.5) / times

        def poll(started: float = started, moment: float = moment) -> None:
            if time.monotonic() - started > moment:
                raise Cancelled

        with contextlib.suppress(Cancelled):
            subject.remote.forward(subject.inputs, TWO, poll=poll)
        answer, seconds = subject.step()
        waited.append(seconds - usual)
        alike += torch.equal(answer, reference)
    kept = "nobody replaced" if pids == [subject.rank(0), subject.rank(1)] else "workers replaced"
    return row(
        f"a cancel in a step, the next at once ({kept})", times, "-", f"{max(0.0, max(waited)):.1f} s at most", "-",
        f"{alike} equal",
    )  # fmt: skip


CHILD = """
import sys, time; sys.path.insert(0, {importable!r})
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
cluster = Cluster.start(ClusterRequest(workers=2))
cluster.workers()
print(cluster.driver.session, cluster.driver.folder, flush=True)
time.sleep({seconds})
"""


def end_rows(times: int, only: str) -> list[str]:
    """Of the process that has started the workers, which is ComfyUI's."""
    rows = []
    for name, number in {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "an exit": 0}.items():
        if only and only not in f"{name} of ComfyUI's process":
            continue
        left = 0
        for _ in range(times):
            code = CHILD.format(importable=str(ROOT / "importable"), seconds=3600 if number else 0)
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            session, folder = process.stdout.readline().split()
            if number:
                process.send_signal(number)
            process.wait()
            deadline = time.monotonic() + WITHIN_S
            while (processes_of(int(session)) or Path(folder).exists()) and time.monotonic() < deadline:
                time.sleep(0.1)
            left += len(processes_of(int(session))) + Path(folder).exists()
        rows.append(row(f"{name} of ComfyUI's process", times, "-", "-", f"{left} after {WITHIN_S:.0f} s", "-"))
    return rows


def memory_row(subject: Subject, runs: int = 50) -> str:
    """Many runs: what the processes hold at the end against the tenth, and whether all answers are those of the first."""
    subject.inputs = Case("run", shape=LatentShape(8, 16, 16)).inputs(subject.remote.source.spec)
    reference, equal, held = subject.step()[0], 1, []
    for number in range(2, runs + 1):
        equal += torch.equal(subject.step()[0], reference)
        if number in (10, runs):
            held.append(_held(subject))
    told = ", ".join(f"{name} {first} to {last}" for name, first, last in zip(("MiB", "descriptors", "threads"), *held))
    return row(f"a run ({told})", runs, equal, "-", "-", "-")


def _held(subject: Subject) -> tuple[int, int, int]:
    processes = [psutil.Process(), *processes_of(subject.cluster.driver.session)]
    return (
        sum(process.memory_full_info().pss for process in processes) // 2**20,
        sum(process.num_fds() for process in processes),
        sum(process.num_threads() for process in processes),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_tiny_checkpoint(path, "LTX-Video")
        checkpoint = open_checkpoint(path)
        model = DiffusersModel.of_checkpoint(checkpoint)
        with Cluster.start(ClusterRequest(workers=2)) as cluster:
            subject = Subject(cluster, cluster.load(checkpoint, model), Case("fault", shape=SHAPE).inputs(model))
            rows = fault_rows(subject, arguments.times, arguments.only)
            if not arguments.only:
                rows.append(memory_row(subject))
        rows += end_rows(arguments.times, arguments.only)
    head = [row("fault", "tries", "equal answer", "lost", "left behind", "next run"), "|---|---|---|---|---|---|"]
    table = [*head, *rows]
    print("\n".join(table))
    if arguments.write is not None:
        write_table(arguments.write, Path(__file__).name, table)


if __name__ == "__main__":
    main()
