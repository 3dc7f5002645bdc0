"""Two machines, in network namespaces of their own: a step is shared, cancelled, and survives the end of one of them."""

from __future__ import annotations

import threading

import pytest

from rayltx.about import ROOT

from two_machines import NotHere, two_machines

pytestmark = pytest.mark.slow

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
    print("lost", time.monotonic() - started - usual, usual, flush=True)
    kept = sum(info.pid in first for info in cluster.workers())
    print("equal", torch.equal(answer, reference), kept, flush=True)
    print("equal", torch.equal(remote.forward(inputs, TWO)["video"], reference), flush=True)
"""


@pytest.fixture
def machines():
    try:
        with two_machines() as machines:
            yield machines
    except NotHere as reason:
        pytest.skip(str(reason))


def _told(process, word):
    line = next((line for line in process.stdout if line.startswith(word)), "")
    assert line, f"it ended ({process.wait()}) before it said {word}"
    return line.split()[1:]


@pytest.mark.parametrize("then", ["cancel", "kill", "cut"])
def test_a_step_on_two_machines(machines, tmp_path, then):
    with open(tmp_path / "log", "wb") as log:
        process = machines.run(STEPS, str(tmp_path / "model.safetensors"), machines.address, then, stderr=log)
    limit = threading.Timer(400.0, process.kill)  # of a child that hangs, whose lines are waited for
    limit.start()
    assert float(_told(process, "error")[0]) < 2e-6
    if then != "cancel":
        _told(process, "now")
        machines.kill_second() if then == "kill" else machines.cut()
        process.stdin.write("\n")
        process.stdin.flush()
    print(then, "lost", _told(process, "lost"))
    equal, kept = _told(process, "equal")
    assert equal == "True"
    assert (kept == "2") == (then == "cancel")
    assert _told(process, "equal") == ["True"]
    assert process.wait() == 0
    limit.cancel()
    said = (tmp_path / "log").read_text()
    assert ("no progress for" in said) == (then == "cut") and ("died" in said) == (then != "cancel")
