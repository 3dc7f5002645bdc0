"""Faults of what is around the workers: no room, and other Rays on the machine.

PYTHON scripts/fault_surroundings.py CHECKPOINT SECONDS ANSWERS [nothing|fill|kill|free ...]     see `child`
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fault_subject import Bench, NotTriedHere, Subject, TinyModel, Tried, end_current, left_of, superfluous_workers

# isort: split

import numpy as np
import torch

from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.driver.processes import end_session, processes_of
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import RayLTXError

from two_machines import NotHere, Steps, two_machines

MIB = 2**20


# ---- no room


def full_store(bench: Bench) -> Tried:
    """More is in Ray's store than it holds when a model is loaded, and when it is loaded again for another worker."""
    reference = bench.reference
    cluster = Cluster.start(ClusterRequest(workers=2, object_store_bytes=128 * MIB))
    cluster.workers()
    ballast = [cluster.driver.keep(np.full(32 * MIB, number, np.uint8)) for number in range(6)]
    subject = bench.subject(cluster)
    answer = subject.step()[0]
    os.kill(subject.rank(1), signal.SIGKILL)
    again, seconds = subject.step()
    assert all(each.is_there for each in ballast)
    equal = torch.equal(answer, reference) and torch.equal(again, reference)
    del ballast
    subject.remote.release()
    subject = bench.subject(cluster)
    following = torch.equal(subject.step()[0], reference)
    return Tried(equal, following, left=superfluous_workers(cluster))


def _mounted(size: str, place: Path | str, command: list[str]) -> list[str]:
    """A command that alone sees a small file system at a place."""
    _need_unshare()
    mount = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
    return ["unshare", "-m", "sh", "-c", mount, "sh", size, str(place), *command]


def _need_unshare() -> None:
    try:
        tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
    except FileNotFoundError:
        raise NotTriedHere("there is no unshare") from None
    if tried.returncode != 0:
        raise NotTriedHere(tried.stderr.strip())


def _run_with(bench: Bench, size: str, place: Path | str, *happens: str, **environment: str) -> tuple[Tried, Path]:
    """`child` where a place is small. What became of it, and where its files were."""
    saved_at = bench.folder / "answers.pt"
    command = [sys.executable, __file__, bench.model.checkpoint.path, str(bench.usual_s), str(saved_at), *happens]
    subprocess.run(_mounted(size, place, command), check=True, env={**os.environ, **environment})
    saved = torch.load(saved_at)
    *disturbed, following = [each is not None and torch.equal(each, bench.reference) for each in saved["answers"]]
    return Tried(all(disturbed), following, left=len(processes_of(saved["session"]))), Path(saved["folder"])


def small_shared_memory(bench: Bench) -> Tried:
    return _run_with(bench, "64m", "/dev/shm", "nothing", "kill", "nothing")[0]


def full_temporary_folder(*happens: str) -> Callable[[Bench], Tried]:
    def case(bench: Bench) -> Tried:
        with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as place:
            tried, folder = _run_with(bench, "100m", place, *happens, TMPDIR=place)
            assert folder.parent == Path(place), "it was not used"
            return tried

    return case


def small_temporary_folder(bench: Bench) -> Tried:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as place:
        tried, folder = _run_with(bench, "32m", place, "kill", "nothing", TMPDIR=place)
        assert folder.parent != Path(place), "it was used"
        return tried


def child(path: Path, usual_s: float, saved_at: Path, happens: Sequence[str]) -> None:
    """Steps in a process of its own, and what happens in the middle of each: nothing, a worker's end, or that a folder fills up.

    "free" makes room before the step that follows.
    """
    model, answers = TinyModel(path), []
    filler = Path(tempfile.gettempdir()) / "filler"
    with Cluster.start(ClusterRequest(workers=2)) as cluster:
        subject = Subject(cluster, model.on(cluster), model.long, usual_s)
        saved = {"answers": answers, "session": cluster.driver.session, "folder": str(cluster.driver.folder)}
        for what in happens:
            if what == "free":
                filler.unlink()
                continue
            kill = functools.partial(os.kill, subject.rank(1), signal.SIGKILL) if what == "kill" else None
            try:
                answers.append(subject.step(functools.partial(_fill, filler) if what == "fill" else kill)[0])
            except RayLTXError as error:
                print(error, file=sys.stderr, flush=True)
                answers.append(None)
    torch.save(saved, saved_at)


def _fill(filler: Path) -> None:
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB))
    assert shutil.disk_usage(filler.parent).free < MIB


# ---- other Rays

STEPS = """
import sys; sys.path.insert(0, {folder!r})
from fault_surroundings import Cluster, ClusterRequest, Subject, TinyModel
from pathlib import Path
model = TinyModel(Path({checkpoint!r}))
cluster = Cluster.start(ClusterRequest(workers=2))
subject = Subject(cluster, model.on(cluster), model.short)
subject.step()
print(cluster.driver.session, cluster.driver.folder, flush=True)
while True:
    subject.step()
"""


def two_processes(bench: Bench) -> Tried:
    """Of which one is killed in the middle of the other's step, and of its own."""
    cluster = Cluster.start(bench.plain)
    subject = bench.subject(cluster)
    code = STEPS.format(folder=str(Path(__file__).parent), checkpoint=bench.model.checkpoint.path)
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        session, folder = other.stdout.readline().split()
        beside = torch.equal(subject.step()[0], bench.reference)
        answer, _ = subject.step(other.kill)
    finally:
        other.kill()
        other.wait()
    left = left_of(int(session), Path(folder))
    following = torch.equal(subject.step()[0], bench.reference)
    subject.remote.release()
    return Tried(beside and torch.equal(answer, bench.reference), following, left=left)


# In a session of its own, without this package on its search path. Each line that it is sent is answered.
FOREIGN = """
import sys
import ray
from ray.cluster_utils import Cluster
size = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**size, "temp_dir": sys.argv[1]})
ray.init(address=cluster.address, log_to_driver=False)
print("address", cluster.address, flush=True)
for line in sys.stdin:
    print(sum(node["Alive"] for node in ray.nodes()), len(ray._private.state.actors()), flush=True)
"""


@contextlib.contextmanager
def foreign_ray() -> Iterator[tuple[str, Callable[[], list[int]]]]:
    """Its address, and what tells how many nodes and actors it has."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.Popen(
            [sys.executable, "-c", FOREIGN, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environment, "RAY_AUTH_MODE": "disabled"}, start_new_session=True, cwd=folder,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def counts() -> list[int]:
            stdin.write("\n")
            stdin.flush()
            return [int(number) for number in stdout.readline().split()]

        try:
            line = next((line for line in stdout if line.startswith("address ")), None)
            assert line is not None, "Ray did not start"
            yield line.split()[1], counts
        finally:
            process.kill()
            process.wait()
            end_session(process.pid)


def beside_a_foreign_ray(bench: Bench) -> Tried:
    """Ours starts, works, loses its raylet and ends, while RAY_ADDRESS names another's."""
    reference = bench.reference
    end_current()
    with foreign_ray() as (address, counts):
        os.environ["RAY_ADDRESS"] = address
        try:
            alone = counts()
            with Cluster.start(bench.plain) as cluster:
                subject = bench.subject(cluster)
                answer = subject.step()[0]
                beside = counts()
                raylet = functools.partial(os.kill, subject.process("raylet"), signal.SIGKILL)
                after = subject.step(raylet)[0]
                following = torch.equal(subject.step()[0], reference)
                session, folder = cluster.driver.session, cluster.driver.folder
            left = left_of(session, folder)
            assert alone == beside == counts() == [1, 0], "the other Ray was touched"
        finally:
            del os.environ["RAY_ADDRESS"]
    return Tried(torch.equal(answer, reference) and torch.equal(after, reference), following, left=left)


def one_of_two_machines(then: str) -> Callable[[Bench], Tried]:
    """then: see `Steps.disturbed`."""

    def case(bench: Bench) -> Tried:
        folder = bench.folder / then
        folder.mkdir()
        try:
            with two_machines() as machines:
                steps = Steps.disturbed(machines, folder, then)
        except NotHere as reason:
            raise NotTriedHere(str(reason)) from None
        return Tried(steps.is_equal, steps.next_is_equal, steps.lost_s)

    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("usual_s", type=float)
    parser.add_argument("answers", type=Path)
    parser.add_argument("happens", nargs="+", choices=("nothing", "fill", "kill", "free"))
    arguments = parser.parse_args()
    child(arguments.checkpoint, arguments.usual_s, arguments.answers, arguments.happens)


if __name__ == "__main__":
    main()
