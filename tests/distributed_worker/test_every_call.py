"""Every call of a worker fails: it raises on one rank, ends the process, or never returns. The next prompt is right."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.exactness import CASES
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.worker import Worker
from rayltx.distributed_worker.worker_calls import ask, ask_together
from rayltx.errors import ClusterError
from rayltx.sequence_parallel.partition import ParallelConfig

from cluster_hosts import ScalingHost
from fault_points import BEGIN, END, EXIT, HANG, RAISE, FaultPoints, points_of

TESTS = str(Path(__file__).parents[1])
HOST, HOST_FORWARD = "cluster_hosts:ScalingHost", "ScalingHost.forward"
TWO = ParallelConfig(2, 1)
LIMIT_S = 90.0  # of a call, a worker's start among them
SHORT_S = 8.0  # of one that hangs

POINTS = [*points_of(Worker), *points_of(ScalingHost)]
KINDS = [(kind, BEGIN) for kind in (RAISE, EXIT, HANG)] + [(kind, END) for kind in (RAISE, EXIT)]
IN_SHORT = [
    *((RAISE, BEGIN, point) for point in ("Worker.take_portions", "Worker.call_host", HOST_FORWARD)),
    (EXIT, BEGIN, "Worker.take_portions"),
    (EXIT, END, HOST_FORWARD),
]
# What ends the prompt, and the words that the message has: of rank 0 alone, whose exception then is what every rank raised that
# was asked. All else is done again.
TOLD_IF_RAISED = {"Worker.read_portion": "loading model.safetensors"}
# Of two ranks: the scenario begins with one, which has nobody to disagree with.
TOGETHER = ("Worker.join", "Worker.leave", "Worker.call_host_together", "ScalingHost.meet", HOST_FORWARD)


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    return FaultPoints(str(tmp_path_factory.mktemp("orders")), (HOST,))


@pytest.fixture(scope="module")
def cluster(points):
    request = ClusterRequest(
        workers=2, step_timeout_s=LIMIT_S, call_timeout_s=LIMIT_S, bootstrap=points.bootstrap(), host=HOST
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayltx.distributed_worker.outcomes.GRACE_S", 2.0)
        patch.setattr("rayltx.distributed_worker.rank_group._PING_TIMEOUT_S", 2.0)
        patch.setenv("PYTHONPATH", TESTS)  # for the workers to find this folder's modules
        with Cluster.start(request) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """A prompt. before_two: called before the second step, which is the first of two ranks."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-Video")
    checkpoint = open_checkpoint(path)
    model = DiffusersModel.of_checkpoint(checkpoint)
    inputs = CASES[1].inputs(model)

    def prompt(before_two=lambda: None):
        remote = cluster.load(checkpoint, model)
        try:
            remote.set_up("factor", ask(ScalingHost.set_factor, torch.full((3, 5, 7), 3.0)), "setting the factor")
            answers = [remote.forward(inputs, ParallelConfig(1, 1))["video"]]
            before_two()
            assert remote.call_together(ask_together(ScalingHost.meet), TWO, "the test of the ranks") == 2
            answers.append(remote.forward(inputs, TWO)["video"])
            assert len(cluster.memory()) == 2
            assert len(cluster.group.run_whole(ask(Worker.speed), "measuring the devices")) == 2
            digests = remote.digest()
        finally:
            remote.release()
        return answers, digests

    return prompt


@pytest.fixture(scope="module")
def reference(run):
    return run()


def assert_same(answer, reference):
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(answer[0], reference[0], strict=True))
    assert answer[1] == reference[1] and set(answer[1]) == {0, 1}


@contextlib.contextmanager
def limits_until_it_hangs(request, points, point):
    """Short ones: the call that hangs has got its own by then, and those that mend what follows have more time."""

    def limit(seconds):
        for name in ("step_timeout_s", "call_timeout_s"):
            object.__setattr__(request, name, seconds)

    ended = threading.Event()

    def watch():
        while not points.num_carried_out(HANG, point) and not ended.is_set():
            time.sleep(0.02)
        limit(LIMIT_S)

    limit(SHORT_S)
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def cases():
    return [
        pytest.param(kind, at, point, marks=() if (kind, at, point) in IN_SHORT else pytest.mark.slow)
        for kind, at in KINDS
        for point in POINTS
        if (at, point) != (END, "Worker.prepare")  # it puts the points in
    ]


@pytest.mark.parametrize("kind, at, point", cases())
def test_a_fault_in_a_call(cluster, run, reference, points, monkeypatch, caplog, kind, at, point):
    points.clear()
    held, told = cluster.held_bytes(), kind == RAISE and TOLD_IF_RAISED.get(point)
    with monkeypatch.context() as patch:
        if point == "Worker.take_file":
            patch.setattr(cluster.store, "_total_bytes", lambda: 1000)
        if point == "Worker.prepare":  # of a worker that takes another's place
            os.kill(cluster.workers()[1].pid, signal.SIGKILL)

        def order():
            points.order(kind, point, at)

        if point not in TOGETHER:
            order()
        ending = pytest.raises(ClusterError, match=told) if told else contextlib.nullcontext()
        hanging = limits_until_it_hangs(cluster.request, points, point) if kind == HANG else contextlib.nullcontext()
        with caplog.at_level(logging.WARNING, "rayltx"), hanging, ending:
            assert_same(run(order if point in TOGETHER else lambda: None), reference)
    assert points.num_carried_out(kind, point, at) == 1, "the fault did not come"
    assert_same(run(), reference)
    assert points.num_carried_out(kind, point, at) == 1
    assert len({info.pid for info in cluster.workers()}) == 2 and not cluster.group.is_broken
    assert cluster.held_bytes() == held
