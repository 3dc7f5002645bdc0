"""What answers mean together, and the ranks that messages name."""

from __future__ import annotations

import pytest
import torch

from rayltx.devices import CPU, KINDS
from rayltx.distributed_worker.outcomes import Failure, Gone, Outcome, results
from rayltx.errors import InputError, OutOfMemory, RanksDisagree, RanksFailedAlike, WorkerDied, WorkerStuck


def failed(text="out of patience"):
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        return Outcome(failure=Failure.of(error, KINDS[CPU]))


def test_results_are_by_rank():
    answers = {3: Outcome("three"), 1: Outcome("one")}
    assert results(answers, (1, 3), 4, "reading", 9.0) == {1: "one", 3: "three"}


def test_a_worker_that_died_is_named_by_its_rank():
    """Asked alone, rank 2 of 3 is not rank 0 of 1."""
    with pytest.raises(WorkerDied, match=r"^loading: rank 2 of 3 died \(its process ended\)$"):
        results({2: Gone("its process ended")}, (2,), 3, "loading", 9.0)


def test_a_silent_rank_is_named_by_its_rank():
    with pytest.raises(WorkerStuck, match=r"no answer within 9 s from rank 1, 2 of 4$"):
        results({3: Outcome()}, (1, 2, 3), 4, "setting patches", 9.0)


def test_one_that_fails_alone_is_named_and_so_are_those_that_went_on():
    with pytest.raises(
        RanksDisagree, match=r"reading: rank 3: RuntimeError: .*; no answer from rank 2; rank 1 went on"
    ):
        results({3: failed(), 1: Outcome()}, (1, 2, 3), 4, "reading", 9.0)


@pytest.mark.parametrize(
    "asked, num_ranks, who", [((1, 2), 3, "all 2 ranks"), ((2,), 3, "rank 2"), ((0,), 1, "the worker")]
)
def test_who_failed_alike(asked, num_ranks, who):
    with pytest.raises(RanksFailedAlike, match=f"^hashing: {who} failed with RuntimeError: out of patience"):
        results(dict.fromkeys(asked, failed()), asked, num_ranks, "hashing", 9.0)


def test_a_user_error_that_all_raised_is_raised_itself():
    try:
        raise InputError("seed=-1 must not be negative")
    except InputError as error:
        outcome = Outcome(failure=Failure.of(error, KINDS[CPU]))
    with pytest.raises(InputError, match="seed=-1"):
        results({0: outcome, 1: outcome}, (0, 1), 2, "the step", 9.0)


def out_of_memory(free, pid, used):
    """CUDA's own words, which are other ones in each process."""
    text = (
        f"CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has a total capacity of 23.64 GiB of which {free} MiB is "
        f"free. Process {pid} has 1.12 GiB memory in use. Including non-PyTorch memory, this process has {used} GiB memory "
        "in use. Of the allocated memory 19.87 GiB is allocated by PyTorch, and 1.31 GiB is reserved by PyTorch."
    )
    try:
        raise torch.OutOfMemoryError(text)
    except torch.OutOfMemoryError as error:
        return Outcome(failure=Failure.of(error, KINDS[CPU]))


BOTH = {0: out_of_memory("412.31", 4711, "21.90"), 1: out_of_memory("655.00", 4712, "22.61")}


@pytest.mark.parametrize("second", [BOTH[1], failed("Connection closed by peer"), Outcome(), None])
def test_out_of_memory_is_a_failure_of_its_own_whatever_the_others_say(second):
    answers = {0: BOTH[0], 1: second} if second is not None else {0: BOTH[0]}
    short = "0, 1" if second is BOTH[1] else "0"
    with pytest.raises(
        OutOfMemory, match=rf"^the step: rank {short} of 2 ran out of memory. rank 0: .*412.31 MiB is free"
    ):
        results(answers, (0, 1), 2, "the step", 9.0)


def test_a_rank_that_died_counts_more_than_memory():
    with pytest.raises(WorkerDied, match="rank 1 of 2 died"):
        results({0: BOTH[0], 1: Gone("its process ended")}, (0, 1), 2, "the step", 9.0)
