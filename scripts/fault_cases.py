"""Faults that need more than a signal in the middle of a step. `faults.py` runs them; `CASES` names them."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from collections.abc import Callable

import fault_surroundings as surroundings
from fault_subject import (
    TWO,
    Bench,
    Subject,
    TinyModel,
    Tried,
    end_current,
    left_of,
    seconds_of,
    superfluous_workers,
    wait_for,
)

# isort: split

import psutil
import torch

from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import CheckpointError
from rayltx.sequence_parallel.partition import ParallelConfig

from fault_points import BEGIN, END, EXIT

FAILING = "cluster_hosts:FailingHost"


# ---- a worker ends in a call


def ends_in(point: str, at: str = BEGIN, of_two: bool = False) -> Callable[[Bench], Tried]:
    """The process that is the first in the call ends there. of_two: not before two ranks are at work."""

    def case(bench: Bench) -> Tried:
        starting = point == "Worker.prepare"
        usual_s = bench.usual_start_s if starting else bench.usual_prompt_s()
        if starting:
            end_current()
        bench.points.clear()
        order = functools.partial(bench.points.order, EXIT, point, at)
        if not of_two:
            order()
        answers, seconds = seconds_of(
            lambda: bench.prompt(Cluster.start(bench.armed), order if of_two else lambda: None)
        )
        assert bench.points.num_carried_out(EXIT, point, at) == 1, "the fault did not come"
        cluster = Cluster.start(bench.armed)
        again = bench.prompt(cluster)
        return Tried(
            bench.is_whole(answers), bench.is_whole(again), seconds - usual_s, superfluous_workers(cluster)
        )  # fmt: skip

    return case


def loop_in_a_block(bench: Bench) -> Tried:
    cluster = Cluster.start(bench.plain)
    subject = bench.subject(cluster, FAILING)
    assert torch.equal(subject.step()[0], bench.reference)
    hung = bench.folder / f"hung-{time.monotonic_ns()}"
    subject.inputs = {**bench.model.long, "fail": ("loop in a block", 1, str(hung))}
    answer, seconds = subject.step()
    assert hung.exists(), "the fault did not come"
    again = subject.step()[0]
    left = superfluous_workers(cluster)
    subject.remote.release()
    equal = torch.equal(answer, bench.reference), torch.equal(again, bench.reference)
    return Tried(*equal, seconds - bench.usual_s, left)


# ---- a file that changes


def changed_file(fault: str, is_cut: bool = True) -> Callable[[Bench], Tried]:
    """A file changes after it was loaded: half of it is cut off, or another takes its place.

    fault: "worker" leaves the weights in Ray's store, "raylet" does not, and "mapped" has them nowhere but in the file.
    """
    return functools.partial(_changed_file, fault, is_cut)


def _changed_file(fault: str, is_cut: bool, bench: Bench) -> Tried:
    path = bench.folder / "changed.safetensors"
    shutil.copy(bench.model.checkpoint.path, path)
    cluster = Cluster.start(ClusterRequest(workers=2, map_files=fault == "mapped"))
    inputs = bench.model.short
    remote, other = TinyModel(path).on(cluster), bench.other.on(cluster)
    before = remote.forward(inputs, TWO)["video"]
    if is_cut:
        os.truncate(path, path.stat().st_size // 2)
    else:
        shutil.copy(bench.other.checkpoint.path, path.with_name("new"))
        os.replace(path.with_name("new"), path)
    session, folder = cluster.driver.session, cluster.driver.folder
    if fault == "worker":
        os.kill(cluster.workers()[1].pid, signal.SIGKILL)
    elif fault == "raylet":
        os.kill(Subject(cluster, remote, inputs).process("raylet"), signal.SIGKILL)
        wait_for(lambda: not cluster.driver.is_running)
    try:
        right = torch.equal(remote.forward(inputs, TWO)["video"], bench.short) and fault == "worker"
    except CheckpointError as error:
        right = fault != "worker" and remote.is_lost and "changed.safetensors could not be loaded again" in str(error)
    others = torch.equal(other.forward(bench.other.short, TWO)["video"], bench.others_short)
    left = superfluous_workers(cluster) + (left_of(session, folder) if cluster.driver.session != session else 0)
    other.release(), remote.release()
    again = bench.model.on(cluster)
    following = torch.equal(again.forward(inputs, TWO)["video"], bench.short)
    again.release()
    return Tried(torch.equal(before, bench.short) and right and others, following, left=left)


# ---- several clusters


def changes(bench: Bench, times: int = 20) -> Tried:
    """Another number of workers each time, and two models in turn. Each kind has been seen once before they count."""
    models, references = (bench.model, bench.other), {}
    equal = left = 0
    held = []
    end_current()
    for number in range(-6, times):
        before = Cluster.current()
        cluster = Cluster.start(ClusterRequest(workers=1 + number % 3))
        if before is not None:
            left += left_of(before.driver.session, before.driver.folder)
        del before
        model, config = models[number % 2], ParallelConfig(cluster.request.workers, 1)
        answer = model.on(cluster).forward(model.short, config)["video"]
        if number < 0:
            references[number % 2, config] = answer
        else:
            equal += torch.equal(answer, references[number % 2, config])
        if number in (0, times - 1):
            held.append(_held())
        del cluster
    told = ", ".join(f"{name} {first} to {last}" for name, first, last in zip(("MiB", "descriptors", "threads"), *held))
    return Tried(equal, None, None, left, times, f"this process: {told}")


def _held() -> tuple[int, int, int]:
    process = psutil.Process()
    return process.memory_full_info().uss // 2**20, process.num_fds(), process.num_threads()


CASES: dict[str, Callable[[Bench], Tried]] = {
    "a worker ends while it starts": ends_in("Worker.prepare"),
    "a worker ends while it reads weights": ends_in("Worker.read_portion"),
    "a worker ends while it takes weights": ends_in("Worker.take_portions"),
    "a worker ends while it is set up": ends_in("Worker.call_host"),
    "a worker ends while the group is formed": ends_in("Worker.join", of_two=True),
    "a worker ends in a test of the ranks": ends_in("ScalingHost.meet", of_two=True),
    "a worker ends when it has computed, before it answers": ends_in("ScalingHost.forward", END, of_two=True),
    "an endless loop in a block of rank 1": loop_in_a_block,
    "Ray's store is full; then SIGKILL of rank 1": surroundings.full_store,
    "/dev/shm of 64 MB; then SIGKILL of rank 1": surroundings.small_shared_memory,
    "the temporary folder fills up in a step": surroundings.full_temporary_folder("fill", "nothing"),
    "the temporary folder fills up, and SIGKILL of rank 1; the next run when there is room": surroundings.full_temporary_folder(
        "fill", "kill", "free", "nothing"
    ),
    "a temporary folder of 32 MB: another place is found": surroundings.small_temporary_folder,
    "a loaded file is cut; then SIGKILL of rank 1": changed_file(fault="worker"),
    "a loaded file is cut; then SIGKILL of the raylet: its model ends with an error, another goes on": changed_file(
        fault="raylet"
    ),
    "another file takes a loaded one's place; then the same": changed_file(fault="raylet", is_cut=False),
    "a mapped file is cut: its model ends with an error, another goes on": changed_file(fault="mapped"),
    "another number of workers, another model": changes,
    "a second process with its own cluster, and SIGKILL of it": surroundings.two_processes,
    "another's Ray, named by RAY_ADDRESS; SIGKILL of our raylet": surroundings.beside_a_foreign_ray,
    "one of two machines is killed in a step": surroundings.one_of_two_machines("kill"),
    "one of two machines is cut off in a step": surroundings.one_of_two_machines("cut"),
}  # fmt: skip
