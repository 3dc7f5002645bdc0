"""Call all ranks at once, and tell what their answers mean together.

Either every rank failed alike: the group is in step, the caller may try again. Or ranks disagree, one died, or one is
silent: their collectives are out of step, and the group must be formed anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from rayltx.distributed_worker.worker import Failure, Outcome
from rayltx.errors import ClusterError, RanksDisagree, RanksFailedAlike, UserError, WorkerDied, WorkerStuck

logger = logging.getLogger(__name__)

POLL_S = 0.1
# After one rank has failed, how long the others have to say the same, or that they noticed.
GRACE_S = 5.0


def wait_for_outcomes(
    references: Mapping[int, ray.ObjectRef], timeout_s: float, poll: Callable[[], None] | None = None
) -> dict[int, Outcome | RayError]:
    """Collect what ranks answer. A dead rank's answer is Ray's error; a silent rank has none.

    poll: called about ten times a second; what it raises ends the waiting, not the ranks' work.
    """
    waiting = {reference: rank for rank, reference in references.items()}
    outcomes: dict[int, Outcome | RayError] = {}
    deadline = time.monotonic() + timeout_s
    while waiting:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=min(left, POLL_S if poll else left))
        for reference in ready:
            rank = waiting.pop(reference)
            try:
                outcome = ray.get(reference)
                for level, message in outcome.logs:
                    logging.getLogger("rayltx.workers").log(level, "rank %d: %s", rank, message)
            except RayError as error:
                outcome = error
            failed = isinstance(outcome, RayError) or outcome.failure is not None
            if failed and not any(_has_failed(other) for other in outcomes.values()):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            outcomes[rank] = outcome
        if poll is not None:
            poll()
    return outcomes


def _has_failed(outcome: Outcome | RayError) -> bool:
    return isinstance(outcome, RayError) or outcome.failure is not None


def values(outcomes: Mapping[int, Outcome | RayError], num_ranks: int, what: str, timeout_s: float) -> list[Any]:
    """What the ranks returned, in order.

    what: the work, for messages ("step", "loading").
    Raises the users' error that all ranks raised; RanksFailedAlike; RanksDisagree; WorkerDied; WorkerStuck.
    """
    dead = {rank: outcome for rank, outcome in outcomes.items() if isinstance(outcome, RayError)}
    failures = {
        rank: outcome.failure for rank, outcome in outcomes.items() if isinstance(outcome, Outcome) and outcome.failure
    }
    silent = sorted(set(range(num_ranks)) - set(outcomes))
    if not dead and not failures and not silent:
        return [outcomes[rank].value for rank in range(num_ranks)]
    if dead:
        names = ", ".join(str(rank) for rank in sorted(dead))
        reason = next(iter(dead.values()))
        raise WorkerDied(f"{what}: rank {names} of {num_ranks} died ({_first_line(reason)})") from reason
    if not failures:
        raise WorkerStuck(
            f"{what}: no answer within {timeout_s:.0f} s from rank {', '.join(map(str, silent))} of {num_ranks}"
        )
    kinds = {(failure.kind, failure.text) for failure in failures.values()}
    first = failures[min(failures)]
    if len(failures) == num_ranks and len(kinds) == 1:
        raise _alike(first, what, num_ranks)
    told = "; ".join(
        f"rank {rank}: {failure.kind}: {_first_line(failure.text)}" for rank, failure in sorted(failures.items())
    )
    fine = sorted(set(range(num_ranks)) - set(failures) - set(silent))
    rest = (f"; no answer from rank {', '.join(map(str, silent))}" if silent else "") + (
        f"; rank {', '.join(map(str, fine))} went on" if fine else ""
    )
    raise RanksDisagree(f"{what}: {told}{rest}\n{first.trace}")


def _alike(failure: Failure, what: str, num_ranks: int) -> Exception:
    if isinstance(failure.error, (UserError, ClusterError)):
        return failure.error
    ranks = f"all {num_ranks} ranks" if num_ranks > 1 else "the worker"
    error = RanksFailedAlike(f"{what}: {ranks} failed with {failure.kind}: {failure.text}\n{failure.trace}")
    error.__cause__ = failure.error
    return error


def _first_line(text: object) -> str:
    return (str(text).splitlines() or [""])[0][:300]


def is_gone(actor_call: ray.ObjectRef, timeout_s: float) -> bool:
    """Whether a call shows its actor to be dead, or leaves it unanswered."""
    ready, _ = ray.wait([actor_call], timeout=timeout_s)
    if not ready:
        return True
    try:
        ray.get(ready[0])
    except RayActorError:
        return True
    return False
