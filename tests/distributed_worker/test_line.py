"""The short way to a worker: what goes by it, in which order, and what its end means."""

from __future__ import annotations

import os
import signal
import socket

import pytest
import torch
from waiting import wait_for

from rayltx.cli.bench.answering_host import ANSWERING_HOST
from rayltx.demo.vae import CHECKPOINT
from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.driver.line import MOST_BYTES, Line
from rayltx.distributed_worker.driver.link import RayDriver
from rayltx.distributed_worker.outcomes import outcome_of
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.worker import Worker
from rayltx.distributed_worker.worker_calls import ask
from rayltx.sequence_parallel.partition import ParallelConfig

TWO = ParallelConfig(2)
INFO = ask(Worker.memory)


@pytest.fixture(scope="module")
def cluster():
    with Cluster.start(ClusterRequest(workers=2)) as cluster:
        yield cluster


@pytest.fixture
def numbers(cluster, monkeypatch):
    """The workers' numbers, of which all have come to their lines."""
    numbers = _numbers(cluster, monkeypatch)
    wait_for(lambda: all(cluster.driver._run.lines[number].is_up for number in numbers))
    return numbers


def _numbers(cluster, monkeypatch):
    seen = []
    call_each = RayDriver.call_each

    def spied(self, workers, *args, **kwargs):
        seen.append(list(workers))
        return call_each(self, workers, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RayDriver, "call_each", spied)
        cluster.memory()
    return seen[-1]


@pytest.fixture
def remote(cluster):
    """A model that does nothing."""
    remote = cluster.load(open_checkpoint(CHECKPOINT), None, host=ANSWERING_HOST)
    yield remote
    remote.release()


def _answered(driver, answers):
    wait_for(lambda: all(answer.is_done for answer in answers))
    return [outcome_of(answer, 0) for answer in answers]


def test_a_line_is_in_a_folder_of_its_users_own(cluster, numbers):
    line = cluster.driver._run.lines[numbers[0]]
    assert line.path.parent == cluster.driver.folder and line.path.parent.stat().st_mode & 0o077 == 0
    assert len(os.fsencode(line.path)) <= 107


def test_what_is_asked_again_and_again_goes_by_line(cluster, numbers):
    for _ in range(3):
        answers = cluster.driver.call_each(numbers, INFO, by_line=True)
        assert all(answer.serve_call is not None for answer in answers)
        assert all(outcome.unwrap() > 0 for outcome in _answered(cluster.driver, answers))
    assert len(cluster.driver._run.serving) == 2  # one call has each worker read on


def test_both_ways_are_one_order(cluster, numbers):
    """What is asked through Ray is run after what was asked by line before, and what is asked after that, after it."""
    pids = [worker.pid for worker in cluster.workers()]
    for _ in range(3):
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        by_line = cluster.driver.call_each(numbers, ask(Worker.build, "a model", ANSWERING_HOST, None), by_line=True)
        by_ray = cluster.driver.call_each(numbers, ask(Worker.digest, "a model"))
        behind = cluster.driver.call_each(
            numbers, ask(Worker.release, "a model"), by_line=True
        )  # of workers that are busy
        last = cluster.driver.call_each(numbers, ask(Worker.digest, "a model"))
        assert all(answer.serve_call is not None for answer in by_line)
        assert all(answer.serve_call is None for answer in by_ray + behind + last)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        for outcome in _answered(cluster.driver, by_line + by_ray + behind):
            outcome.unwrap()
        for outcome in _answered(cluster.driver, last):
            with pytest.raises(KeyError):
                outcome.unwrap()


def test_what_was_asked_by_line_of_a_worker_that_was_called_back_is_told_when_it_ends(cluster, numbers, remote):
    remote.forward({}, TWO)
    gone = cluster.workers()[1].pid
    os.kill(gone, signal.SIGSTOP)
    by_line = cluster.driver.call_each(numbers, INFO, by_line=True)
    by_ray = cluster.driver.call_each(numbers, INFO)  # calls both back
    os.kill(gone, signal.SIGKILL)
    wait_for(lambda: all(answer.is_done for answer in by_line + by_ray))
    assert sorted(answer.payload is None for answer in by_line + by_ray) == [False, False, True, True]
    assert not cluster.driver._run.answers
    remote.forward({}, TWO)


def test_steps_go_by_line(numbers, remote, monkeypatch):
    asked = []
    ask_by_line = Line.ask
    monkeypatch.setattr(Line, "ask", lambda self, payload: (asked.append(self.worker), ask_by_line(self, payload)))
    for _ in range(3):
        remote.forward({}, TWO)
    assert asked == numbers * 3
    remote.forward({"text": "t" * MOST_BYTES}, TWO)  # more than a socket takes at once
    assert asked == numbers * 3


def test_a_worker_that_ends_while_it_answers_is_told_by_ray(cluster, numbers, remote):
    """And what comes next is asked of the one in its place, by a line of its own."""
    remote.forward({}, TWO)
    gone = cluster.workers()[1].pid
    os.kill(gone, signal.SIGSTOP)
    answers = cluster.driver.call_each(numbers, INFO, by_line=True)
    assert all(answer.serve_call is not None for answer in answers)
    os.kill(gone, signal.SIGKILL)
    wait_for(lambda: all(answer.is_done for answer in answers))
    assert answers[0].payload is not None
    assert answers[1].payload is None and "died" in answers[1].failure
    remote.forward({}, TWO)
    assert gone not in [worker.pid for worker in cluster.workers()]


def test_a_line_that_breaks_leaves_nobody_waiting(cluster, numbers, remote):
    remote.forward({}, TWO)
    pid = cluster.workers()[0].pid
    os.kill(pid, signal.SIGSTOP)
    answers = cluster.driver.call_each(numbers[:1], INFO, by_line=True)
    with socket.socket(fileno=os.dup(cluster.driver._run.lines[numbers[0]]._connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: answers[0].is_done)
    assert answers[0].failure == "its line to this process broke"
    sent = {"latent": torch.arange(4.0)}
    assert torch.equal(remote.forward(sent, TWO)["latent"], sent["latent"])  # through Ray
    assert cluster.workers()[0].pid == pid
