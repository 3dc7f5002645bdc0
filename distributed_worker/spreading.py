"""Calls that do not depend on each other, to whichever worker is free."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rayltx.distributed_worker.driver.link import Answer
from rayltx.distributed_worker.messages import Message, unpack
from rayltx.distributed_worker.outcomes import POLL_S, outcome_of, results
from rayltx.distributed_worker.rank_group import RankGroup
from rayltx.distributed_worker.worker import Worker
from rayltx.distributed_worker.worker_calls import Call
from rayltx.errors import ClusterError, OutOfMemory, RanksFailedAlike, first_line

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass
class _UnderWay:
    number: int
    call: Call[Worker, Message]
    answer: Answer
    since: float  # on the monotonic clock


class Spread(Generic[_Result]):
    """Iterates over what calls give, in the calls' order. What a worker that dies was asked is asked of another.

    calls: taken one by one as workers become free, so that they can be made late. what: the work, for messages.
    Raises as `outcomes.results`, and what the group's poll raises; what is under way then is waited for by what comes next.
    """

    def __init__(
        self, group: RankGroup, calls: Iterable[Call[Worker, Message]], what: str, timeout_s: float, repeats: int = 2
    ) -> None:
        self._group, self._calls, self._what, self._timeout_s = group, enumerate(calls), what, timeout_s
        self._repeats = repeats
        self._again: deque[tuple[int, Call[Worker, Message]]] = deque()
        self._under_way: dict[int, _UnderWay] = {}  # by rank
        self._done: dict[int, Any] = {}  # by the call's number

    def __iter__(self) -> Iterator[_Result]:
        self._group.ensure_whole()
        number = 0
        try:
            while True:
                self._give_work()
                if number in self._done:
                    yield self._done.pop(number)
                    number += 1
                elif self._under_way:
                    self._take_answers()
                else:
                    assert not self._again and not self._done, "calls without an answer"
                    return
        finally:
            if self._under_way:
                answers = {rank: each.answer for rank, each in self._under_way.items()}
                self._group.abandon(answers, self._what, self._timeout_s)

    def _give_work(self) -> None:
        ranks = self._group.all_ranks
        for rank in ranks:
            if rank in self._under_way:
                continue
            if self._again:
                number, call = self._again.popleft()
            # What is done and waits for its turn takes memory.
            elif len(self._done) > len(ranks) or (found := next(self._calls, None)) is None:
                return
            else:
                number, call = found
            self._under_way[rank] = _UnderWay(number, call, self._group.start(rank, call), time.monotonic())

    def _take_answers(self) -> None:
        """Wait until at least one has come, or until it is time to look whether someone wants an end."""
        self._group.wait([each.answer for each in self._under_way.values()], POLL_S)
        error = self._take_those_that_ended()
        if error is not None:
            self._mend(error)
        self._group.poll()

    def _take_those_that_ended(self) -> ClusterError | None:
        """Returns why a worker is gone, if one is."""
        error = None
        for rank, each in list(self._under_way.items()):
            if each.answer.is_done or time.monotonic() - each.since > self._timeout_s:
                del self._under_way[rank]
                error = self._take_or_ask_again(rank, each) or error
        return error

    def _mend(self, error: ClusterError) -> None:
        """Have a worker that is gone replaced, after the others have answered: who is at work is not to be taken for dead."""
        self._group.note_broken()
        while self._under_way:
            self._group.wait([each.answer for each in self._under_way.values()], POLL_S)
            self._take_those_that_ended()
            self._group.poll()
        if not self._repeats:
            raise error
        self._repeats -= 1
        self._group.ensure_whole()

    def _take_or_ask_again(self, rank: int, each: _UnderWay) -> ClusterError | None:
        """Keep what a call gave, or ask for it again where its worker is gone. Returns why it is."""
        outcomes = {rank: outcome_of(each.answer, rank)} if each.answer.is_done else {}
        try:
            found = results(outcomes, [rank], len(self._group.all_ranks), self._what, self._timeout_s)[rank]
            # Mapped before the worker is asked for more: it keeps what it shares until then.
            self._done[each.number] = unpack(found)
        except (RanksFailedAlike, OutOfMemory):
            raise
        except ClusterError as error:
            logger.warning("%s; another worker does it", first_line(error))
            self._again.append((each.number, each.call))
            return error
        return None
