"""Calls that do not depend on each other: in order, late, again where a worker is lost, and ended when somebody wants that."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.worker_calls import ask
from rayltx.errors import RanksFailedAlike

from cluster_hosts import FailingHost

TESTS = str(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-Video")
    checkpoint = open_checkpoint(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", TESTS)  # for the workers to find this folder's modules
        with Cluster.start(ClusterRequest(workers=2, host="cluster_hosts:FailingHost")) as cluster:
            yield cluster.load(checkpoint, DiffusersModel.of_checkpoint(checkpoint))


def calls(numbers, made=None, seconds=0.0):
    for number in numbers:
        if made is not None:
            made.append(number)
        yield ask(FailingHost.doubled, torch.full((300, 300), float(number)), seconds)


@pytest.mark.slow
def test_answers_are_in_the_calls_order(remote):
    assert [float(answer[0, 0]) for answer in remote.spread(calls(range(7)), "doubling")] == [2.0 * n for n in range(7)]
    assert list(remote.spread(calls(()), "nothing")) == []


def test_calls_are_made_when_there_is_room_for_what_they_give(remote):
    made = []
    answers = remote.spread(calls(range(30), made), "doubling")
    next(answers)
    assert len(made) <= 6
    answers.close()
    assert [float(a[0, 0]) for a in remote.spread(calls((3,)), "after one that was left")] == [6.0]


def test_a_worker_that_is_lost_costs_no_answer(remote):
    victim = remote._group.workers()[1].pid
    timer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
    timer.start()
    found = [float(answer[0, 0]) for answer in remote.spread(calls(range(12), seconds=0.2), "doubling")]
    timer.join()
    assert found == [2.0 * n for n in range(12)]
    assert remote._group.workers()[1].pid != victim


@pytest.mark.parametrize("victims", [(0,), (0, 1)])
@pytest.mark.slow
def test_workers_that_are_lost_while_others_have_gone_ahead(remote, victims):
    """The first call is the longest: what was done behind it waits for it, and it has to be asked again."""
    pids = [remote._group.workers()[rank].pid for rank in victims]

    def kill():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(1.0, kill)
    timer.start()
    slow = ask(FailingHost.doubled, torch.full((300, 300), 50.0), 3.0)
    found = [float(answer[0, 0]) for answer in remote.spread([slow, *calls(range(8), seconds=0.05)], "doubling")]
    timer.join()
    assert found == [100.0, *(2.0 * n for n in range(8))]


def test_what_the_poll_raises_ends_it_and_the_next_is_right(remote):
    class Cancelled(Exception):
        pass

    started = time.monotonic()

    def poll():
        if time.monotonic() > started + 0.3:
            raise Cancelled

    with pytest.raises(Cancelled):
        list(remote.spread(calls(range(40), seconds=0.2), "doubling", poll))
    assert [float(answer[0, 0]) for answer in remote.spread(calls(range(3)), "again")] == [0.0, 2.0, 4.0]


def test_what_a_call_raises_is_raised(remote):
    with pytest.raises(RanksFailedAlike, match="no number"):
        list(remote.spread([ask(FailingHost.doubled, None, 0.0)], "doubling"))
    assert len(list(remote.spread(calls(range(3)), "again"))) == 3
