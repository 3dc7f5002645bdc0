"""Breaks running workers in every way that one machine allows, and writes the table of `docs/reliability.md`.

    PYTHON scripts/faults.py [--times 1] [--only WORD] [--write docs/reliability.md]

Two CPU ranks run steps of some seconds on a small model. A fault comes in the middle of one; the step's answer is then compared,
bit by bit, with an undisturbed one, and the next step's too. "Lost" is what the step took more than an undisturbed one. "Left"
counts processes and folders of the Ray that was lost. `fault_cases.py` has the faults that need more than signals. Some twenty
minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from fault_subject import ROOT, SHORT, TESTS, TWO, WITHIN_S, Bench, NotTriedHere, Subject, TinyModel, Tried, row_of
from page_tables import row, write_table

# isort: split

from fault_cases import CASES

from rayltx.diffusion_models.lightricks.exactness import Case
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.driver.processes import processes_of
from rayltx.distributed_worker.request import ClusterRequest


class Cancelled(Exception):
    pass


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
_CANCEL = "a cancel in a step, the next at once"


def fault_rows(subject: Subject, times: int, only: str) -> list[str]:
    reference = subject.measure()
    print(f"a step takes {subject.usual_s:.1f} s", file=sys.stderr, flush=True)
    rows = []
    for name, prepare in FAULTS.items():
        if only in name:
            rows.append(row_of(name, [_fault(subject, prepare, reference) for _ in range(times)]))
            print(rows[-1], file=sys.stderr, flush=True)
    if only in _CANCEL:
        rows.append(_cancels(subject, reference))
    return rows


def _fault(subject: Subject, prepare: Callable[[Subject], Callable[[], None]], reference: torch.Tensor) -> Tried:
    session, folder = subject.cluster.driver.session, subject.cluster.driver.folder
    answer, seconds = subject.step(prepare(subject))
    restarted = subject.cluster.driver.session != session
    left = len(processes_of(session)) + folder.exists() if restarted else 0
    again = torch.equal(subject.step()[0], reference)
    return Tried(torch.equal(answer, reference), again, seconds - subject.usual_s, left)


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
        f"{_CANCEL} ({kept})", times, "-", f"{max(0.0, max(waited)):.1f} s at most", "-",
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
        if only not in f"{name} of ComfyUI's process":
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
    subject.inputs = Case("run", shape=SHORT).inputs(subject.remote.source.spec)
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


def case_rows(folder: Path, times: int, only: str) -> list[str]:
    """Of `fault_cases.py`."""
    names = [name for name in CASES if only in name]
    if not names:
        return []
    bench, rows = Bench(folder), []
    for name in names:
        try:
            rows.append(row_of(name, [CASES[name](bench) for _ in range(times)]))
        except NotTriedHere as reason:
            rows.append(row(f"{name} (not tried here: {reason})", 0, "-", "-", "-", "-"))
        print(rows[-1], file=sys.stderr, flush=True)
    bench.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    times, only = arguments.times, arguments.only
    os.environ["PYTHONPATH"] = str(TESTS)  # for the workers, whose hosts and fault points are the tests'
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if any(only in name for name in (*FAULTS, _CANCEL)):
            model = TinyModel.made(Path(folder) / "signals.safetensors")
            with Cluster.start(ClusterRequest(workers=2)) as cluster:
                subject = Subject(cluster, model.on(cluster), model.long)
                rows += fault_rows(subject, times, only)
                if not only:
                    rows.append(memory_row(subject))
        rows += case_rows(Path(folder), times, only)
        rows += end_rows(times, only)
    head = [row("fault", "tries", "equal answer", "lost", "left behind", "next run"), "|---|---|---|---|---|---|"]
    table = [*head, *rows]
    print("\n".join(table))
    if arguments.write is not None:
        write_table(arguments.write, Path(__file__).name, table)


if __name__ == "__main__":
    main()
