"""What answers mean together, and the ranks that messages name."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError

from rayltx.distributed_worker.outcomes import Failure, Outcome, results
from rayltx.errors import InputError, RanksDisagree, RanksFailedAlike, WorkerDied, WorkerStuck


def failed(text="out of patience"):
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        return Outcome(failure=Failure.of(error))


def test_results_are_by_rank():
    answers = {3: Outcome("three"), 1: Outcome("one")}
    assert results(answers, (1, 3), 4, "reading", 9.0) == {1: "one", 3: "three"}


def test_a_worker_that_died_is_named_by_its_rank():
    """Asked alone, rank 2 of 3 is not rank 0 of 1."""
    with pytest.raises(WorkerDied, match=r"^loading: rank 2 of 3 died \("):
        results({2: ActorDiedError()}, (2,), 3, "loading", 9.0)


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
        outcome = Outcome(failure=Failure.of(error))
    with pytest.raises(InputError, match="seed=-1"):
        results({0: outcome, 1: outcome}, (0, 1), 2, "the step", 9.0)
