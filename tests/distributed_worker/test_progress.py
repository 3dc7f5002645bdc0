"""Who is stuck: by the blocks, and by what a block usually takes."""

from __future__ import annotations

import os
import pickle

import pytest

from rayltx.distributed_worker import progress as module
from rayltx.distributed_worker.progress import Progress
from rayltx.distributed_worker.step_control import StepControl
from rayltx.errors import ClusterError, RanksDisagree, StepCancelled


@pytest.fixture
def clock(monkeypatch):
    """clock.now, which passes by hand."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def enter(control, *ranks):
    for rank in ranks:
        control.at_block(rank)


def test_nobody_is_stuck_before_the_first_block(clock):
    progress = Progress(StepControl(2), 20.0, 300.0)
    clock.now += 10_000.0  # all weights may move
    assert progress.stuck([]) == {}


def test_what_a_block_takes_is_not_known_at_first(clock):
    control = StepControl(2)
    progress = Progress(control, 20.0, 300.0)
    enter(control, 0, 1)
    assert progress.stuck([]) == {}
    clock.now += 299.0
    assert progress.stuck([]) == {}
    clock.now += 2.0
    assert progress.stuck([]).keys() == {0, 1}


def test_one_that_stands_still_is_found_after_ten_blocks_time(clock):
    control = StepControl(2)
    progress = Progress(control, 20.0, 300.0)
    for _ in range(5):
        enter(control, 0, 1)
        progress.stuck([])
        clock.now += 5.0
    enter(control, 0)
    assert progress.stuck([]) == {}
    clock.now += 49.0
    assert progress.stuck([]) == {}
    clock.now += 2.0
    assert progress.stuck([]).keys() == {1} and progress.where(1) == 5
    assert progress.stuck([1]) != {}, "the other waits for nobody then"
    assert progress.stuck([0, 1]) == {}
    assert control.usual_s == 5.0


def test_what_is_known_from_the_last_step_counts(clock):
    control = StepControl(2)
    control.usual_s = 0.5
    progress = Progress(control, 20.0, 300.0)
    enter(control, 0, 1)
    progress.stuck([])
    clock.now += 19.0
    assert progress.stuck([]) == {}
    clock.now += 2.0
    assert progress.stuck([]).keys() == {0, 1}


def test_a_step_may_take_as_long_as_it_goes_on(clock):
    control = StepControl(3)
    progress = Progress(control, 20.0, 300.0)
    for _ in range(200):
        enter(control, 0, 1, 2)
        assert progress.stuck([]) == {}
        clock.now += 60.0


def test_all_stop_at_the_same_block():
    control = StepControl(3)
    enter(control, 0, 1, 2, 0)
    control.cancel()
    enter(control, 1, 2)  # rank 0 has said that block 2 goes on
    for rank in (0, 1, 2):
        with pytest.raises(StepCancelled, match="before block 3"):
            control.at_block(rank)
    for rank in (2, 0, 1):  # who swallows that stops again
        with pytest.raises(StepCancelled, match="before block 3"):
            control.at_block(rank)


def test_who_waits_for_rank_0_is_told_that_it_is_gone():
    control = StepControl(2)
    control.abort()
    control.cancel()
    with pytest.raises(RanksDisagree, match="another rank failed before block 1"):
        control.at_block(1)


def test_two_processes_see_the_same_numbers():
    control = StepControl(2)
    opened = pickle.loads(pickle.dumps(control))
    opened.at_block(0)
    assert control.blocks() == [1, 0]
    control.cancel()
    with pytest.raises(StepCancelled):
        opened.at_block(0)


def test_what_is_gone_is_told():
    payload = pickle.dumps(StepControl(2))
    other = os.open("/dev/null", os.O_RDONLY)  # may get the number that is free now
    with pytest.raises(ClusterError, match="is gone, or is not for this process"):
        pickle.loads(payload)
    os.close(other)


def test_a_rank_that_is_behind_goes_on_to_the_block_of_the_cancel():
    """Ranks 2 and 3 share other rows than 0 and 1: one of them is in a block where it waits for the other."""
    control = StepControl(4)
    enter(control, 0, 1, 2)
    control.cancel()
    for rank in (0, 1):
        with pytest.raises(StepCancelled, match="before block 2"):
            control.at_block(rank)
    enter(control, 3)
    for rank in (2, 3):
        with pytest.raises(StepCancelled, match="before block 2"):
            control.at_block(rank)


def test_a_rank_with_more_blocks_than_rank_0_waits_for_no_word():
    control = StepControl(2)
    enter(control, 0, 1)
    control.at_end(1)
    control.at_end(0)
    enter(control, 1)  # where it would wait for ever
    control.cancel()
    enter(control, 1)
    assert control.blocks() == [1, 3]
