"""What is tried and timed when a group has formed."""

import pytest
import torch
import torch.distributed as dist

from rayltx.errors import ExchangeError
from rayltx.sequence_parallel.first_exchange import check_exchange
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

CPU = torch.device("cpu")
DEGREES = [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)]


def report(degrees):
    return check_exchange(SequenceParallelGroup.create(ParallelConfig(*degrees)), CPU, 2**16)


@pytest.mark.parametrize("degrees", DEGREES)
def test_a_sound_link_is_measured(ranks, degrees):
    for measured in ranks.run(degrees[0] * degrees[1], report, degrees):
        assert measured.bytes_per_s > 0 and measured.small_s > 0


def report_with(damage, damaged_rank, degrees):
    """The error's text, or None: of a group in which something happens to what one rank receives."""
    all_to_all, passed = dist.all_to_all_single, dist.batch_isend_irecv

    def damaged_all_to_all(received, *args, async_op=False, **kwargs):
        work = all_to_all(received, *args, async_op=async_op, **kwargs)
        if dist.get_rank() == damaged_rank and received.nbytes > (2**14 if damage == "large" else 0):
            if work is not None:
                work.wait()
            received[-1] += 1
        return work

    def damaged_pass(operations):
        for work in passed(operations):
            work.wait()
        if dist.get_rank() == damaged_rank:
            operations[-1].tensor.zero_()
        return []

    dist.all_to_all_single = damaged_all_to_all if damage in ("all-to-all", "large") else all_to_all
    dist.batch_isend_irecv = damaged_pass if damage == "send and receive" else passed
    try:
        report(degrees)
    except ExchangeError as error:
        return str(error)
    finally:
        dist.all_to_all_single, dist.batch_isend_irecv = all_to_all, passed
    return None


@pytest.mark.parametrize("degrees", [(3, 1), (2, 2)])
def test_one_wrong_number_is_noticed_by_the_rank_that_it_comes_to(ranks, degrees):
    world_size = degrees[0] * degrees[1]
    found = ranks.run(world_size, report_with, "all-to-all", 1, degrees)
    assert "rank 1 received other numbers than were sent, in trading tokens for heads" in found[1]
    assert [rank for rank, text in enumerate(found) if text] == [1], "the others are through, and go on"


def test_large_messages_are_looked_at_too(ranks):
    """They go by another way than small ones."""
    found = ranks.run(2, report_with, "large", 1, (2, 1))
    assert found[1].endswith("in messages of 32768 bytes") and not found[0]


@pytest.mark.parametrize("degrees", [(1, 3), (2, 2)])
def test_a_ring_that_brings_nothing_is_noticed(ranks, degrees):
    found = ranks.run(degrees[0] * degrees[1], report_with, "send and receive", 1, degrees)
    assert "passing on to the next rank (send and receive)" in found[1] and not found[0]
