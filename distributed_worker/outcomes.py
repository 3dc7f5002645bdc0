"""What ranks answer, and what their answers mean together.

Either every rank failed alike: the call may be repeated. Or some ran out of memory, of which each library's message is
another on each rank: it may be repeated with less. Or ranks disagree, one died, or one is silent: the group must be formed
anew.
"""

from __future__ import annotations

import logging
import math
import pickle
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rayltx.devices import DeviceKind, is_out_of_memory
from rayltx.distributed_worker.driver.link import RAY_ENDED, Answer, RayDriver
from rayltx.distributed_worker.messages import pack
from rayltx.distributed_worker.progress import Progress
from rayltx.distributed_worker.step_control import StepControl
from rayltx.errors import (
    ClusterError,
    OutOfMemory,
    RanksDisagree,
    RanksFailedAlike,
    StepCancelled,
    UserError,
    WorkerDied,
    WorkerStuck,
    first_line,
)

logger = logging.getLogger(__name__)

POLL_S = 0.1
# After one rank has failed, how long the others have to say the same, or that they noticed.
GRACE_S = 5.0

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Failure:
    """An exception as it crosses to the driver: itself where it can be pickled, its text in any case."""

    error: Exception | None
    kind: str
    text: str
    trace: str
    is_out_of_memory: bool = False

    @classmethod
    def of(cls, error: Exception, device: DeviceKind) -> Failure:
        """device: whose memory may have run out. Its state is then added to the text."""
        try:
            pack(error)
            carried: Exception | None = error
        except Exception:  # whatever pickling raises: the text is carried instead
            carried = None
        text, out_of_memory = str(error), is_out_of_memory(error)
        if out_of_memory:
            text = f"{first_line(text)} {device.memory_report()}".strip()
        return cls(carried, type(error).__name__, text, traceback.format_exc(), out_of_memory)


@dataclass(frozen=True)
class Outcome(Generic[_Result]):
    """What a call on a worker gave: a result, or a failure."""

    result: _Result | None = None
    failure: Failure | None = None
    logs: list[tuple[int, str]] = field(default_factory=list)  # (level, message)

    def unwrap(self) -> _Result:
        """The result. Raises what the worker raised."""
        if self.failure is not None:
            raise self.failure.error or RuntimeError(f"{self.failure.kind}: {self.failure.text}")
        return self.result  # type: ignore[return-value]  # a result may be None itself


@dataclass(frozen=True)
class Gone:
    """What a dead rank answers."""

    reason: str


def wait_for_outcomes(
    driver: RayDriver,
    answers: Mapping[int, Answer],
    timeout_s: float,
    poll: Callable[[], None] | None = None,
    control: StepControl | None = None,
    progress: Progress | None = None,
) -> dict[int, Outcome | Gone]:
    """Collect what ranks answer, by rank. A silent rank has no outcome.

    answers: of each rank. timeout_s: since the last sign of progress. poll: called about ten times a second; what it raises ends
    the waiting, not the ranks' work. control: of these calls; a failure lets no rank wait by it.
    Raises Stuck for ranks that make no progress.
    """
    waiting = {answer: rank for rank, answer in answers.items()}
    outcomes: dict[int, Outcome | Gone] = {}
    started, failed = time.monotonic(), None
    while waiting:
        begun = started if progress is None else max(started, progress.last)
        left = min(begun + timeout_s, math.inf if failed is None else failed + GRACE_S) - time.monotonic()
        if left <= 0:
            break
        for answer in driver.wait(waiting, min(left, POLL_S if poll or progress else left)):
            rank = waiting.pop(answer)
            outcomes[rank] = outcome = outcome_of(answer, rank)
            if _has_failed(outcome) and failed is None:
                failed = time.monotonic()
                if control is not None:
                    control.abort()
        if poll is not None:
            poll()
        if progress is not None and failed is None and (stuck := progress.stuck(outcomes)):
            raise Stuck(stuck)
    return outcomes


class Stuck(Exception):
    """ranks: for how many seconds each has made no progress."""

    def __init__(self, ranks: Mapping[int, float]) -> None:
        super().__init__(ranks)
        self.ranks = ranks


def outcome_of(answer: Answer, rank: int) -> Outcome | Gone:
    """What a call that is done gave. Its worker's log is written to this process's."""
    if answer.payload is None:
        return Gone(answer.failure or "")
    try:
        outcome: Outcome = pickle.loads(answer.payload)
    except Exception as error:  # whatever it raises for a class that this process cannot make again
        text = f"its answer cannot be read here: {type(error).__name__}: {error}"
        outcome = Outcome(failure=Failure(None, type(error).__name__, text, traceback.format_exc()))
    for level, message in outcome.logs:
        logging.getLogger("rayltx.workers").log(level, "rank %d: %s", rank, message)
    return outcome


def _has_failed(outcome: Outcome | Gone) -> bool:
    """A cancel is none: all ranks stop, each when it comes to the block."""
    if isinstance(outcome, Gone):
        return True
    return outcome.failure is not None and not isinstance(outcome.failure.error, StepCancelled)


def results(
    answers: Mapping[int, Outcome[_Result] | Gone],
    asked: Sequence[int],
    num_ranks: int,
    what: str,
    timeout_s: float,
) -> dict[int, _Result]:
    """What the ranks returned, by rank.

    asked: the ranks that were called, of `num_ranks`. what: the work, for messages ("a step", "loading").
    Raises the users' error that all asked ranks raised; RanksFailedAlike; OutOfMemory; RanksDisagree; WorkerDied; WorkerStuck.
    """
    dead = {rank: answer for rank, answer in answers.items() if isinstance(answer, Gone)}
    outcomes = {rank: answer for rank, answer in answers.items() if isinstance(answer, Outcome)}
    failures = {rank: outcome.failure for rank, outcome in outcomes.items() if outcome.failure}
    silent = sorted(set(asked) - set(answers))
    if not dead and not failures and not silent:
        return {rank: outcomes[rank].unwrap() for rank in asked}
    if dead:
        reason = first_line(next(iter(dead.values())).reason)
        if reason.startswith(RAY_ENDED):
            raise WorkerDied(f"{what}: {reason}")
        raise WorkerDied(f"{what}: rank {_listed(dead)} of {num_ranks} died ({reason})")
    if not failures:
        raise WorkerStuck(f"{what}: no answer within {timeout_s:.0f} s from rank {_listed(silent)} of {num_ranks}")
    first = failures[min(failures)]
    short = {rank: failure for rank, failure in failures.items() if failure.is_out_of_memory}
    if short:
        told = [f"rank {rank}: {failure.text}" for rank, failure in sorted(short.items())]
        raise OutOfMemory(f"{what}: rank {_listed(short)} of {num_ranks} ran out of memory. {'; '.join(told)}")
    if len(failures) == len(asked) and all((f.kind, f.text) == (first.kind, first.text) for f in failures.values()):
        raise _alike(first, what, asked, num_ranks)
    told = [f"rank {rank}: {failure.kind}: {first_line(failure.text)}" for rank, failure in sorted(failures.items())]
    fine = set(asked) - set(failures) - set(silent)
    if silent:
        told.append(f"no answer from rank {_listed(silent)}")
    if fine:
        told.append(f"rank {_listed(fine)} went on")
    raise RanksDisagree(f"{what}: {'; '.join(told)}\n{first.trace}")


def _alike(failure: Failure, what: str, asked: Sequence[int], num_ranks: int) -> Exception:
    if isinstance(failure.error, (UserError, ClusterError)):
        return failure.error
    ranks = f"all {len(asked)} ranks" if len(asked) > 1 else f"rank {asked[0]}" if num_ranks > 1 else "the worker"
    error = RanksFailedAlike(f"{what}: {ranks} failed with {failure.kind}: {failure.text}\n{failure.trace}")
    error.__cause__ = failure.error
    return error


def _listed(ranks: Mapping[int, object] | set[int] | Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def is_gone(driver: RayDriver, answer: Answer, timeout_s: float) -> bool:
    """Whether a call shows its worker to be dead, or leaves it unanswered."""
    return not driver.wait([answer], timeout_s) or answer.payload is None
