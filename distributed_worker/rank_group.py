"""The workers as ranks: called, waited for, and formed anew when one of them fails."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rayltx.distributed_worker.device_speed import shares_by_speed
from rayltx.distributed_worker.driver.kept import Kept
from rayltx.distributed_worker.driver.link import Answer, RayDriver
from rayltx.distributed_worker.machine_record import MachineRecord
from rayltx.distributed_worker.meeting import MeetingPoint, Meetings, RankControl
from rayltx.distributed_worker.outcomes import Stuck, is_gone, results, wait_for_outcomes
from rayltx.distributed_worker.progress import Progress
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.stacks import STACK_SIGNAL, stack_of
from rayltx.distributed_worker.step_control import StepControl
from rayltx.distributed_worker.worker import LinkReport, Worker, WorkerInfo
from rayltx.distributed_worker.worker_calls import Call, CallKind, ask
from rayltx.errors import (
    ClusterError,
    ExchangeError,
    OutOfMemory,
    RanksDisagree,
    RanksFailedAlike,
    RayLTXError,
    StepCancelled,
    UserError,
    WorkerStuck,
    first_line,
    listed,
)
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_PING_TIMEOUT_S = 5.0
_JOIN_TIMEOUT_S = 120.0  # a link that hangs is told from a slow start, which is over by then
_LONGEST_LINE = 4000  # of the log: what each rank said is in it, and which of them said it first
_STACK_S = 0.5  # that a worker has to write its stack
_COLLECTIVE_TIMEOUT = 1.5  # of the longest limit

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _CallsUnderWay:
    """What ranks were asked together, and have not answered."""

    answers: Mapping[int, Answer]
    what: str
    timeout_s: float
    num_ranks: int  # of the group for a collective call, else of all workers
    is_collective: bool
    control: StepControl | None = None  # of those that are under way together
    is_watched: bool = False  # whether blocks tell how they get on,
    block_s: float = (
        0.0  # and within what time at least no rank is taken for stuck in one; the request's limit where that is more
    )


class RankGroup:
    """All workers, and the process group that the first of them form.

    start_worker: starts the process of a rank, with or without (True) peer-to-peer copies. Returns its number at once.
    reload: gives models to ranks that were replaced. It may call them, and must not ask for the group to be mended.
    """

    def __init__(
        self,
        request: ClusterRequest,
        driver: RayDriver,
        start_worker: Callable[[int, bool], int],
        reload: Callable[[Sequence[int]], None],
    ) -> None:
        self._request, self._driver, self._start_worker, self._reload = request, driver, start_worker, reload
        self._record = MachineRecord(request.machine_record, request.gpu_names())
        self._without_peer_to_peer = self._record.needs_no_peer_to_peer()
        self._actors = [start_worker(rank, self._without_peer_to_peer) for rank in range(request.workers)]
        self._preparing = {rank: self._prepare(rank) for rank in self.all_ranks}
        self._infos: list[WorkerInfo] | None = None
        self._config: ParallelConfig | None = None  # of the process group, while it is whole
        self._broken = False
        self._lacking: set[int] = set()  # ranks that were replaced, and may not have the models yet
        self._abandoned: _CallsUnderWay | None = None
        self._ended = False
        self._poll: Callable[[], None] | None = None
        self._start_failed = self._ray_hangs = False
        self._meetings = Meetings(driver, request.group_address)
        self._speeds: dict[tuple[str, ...], list[float]] = {}  # by what the ranks' devices are
        self.link_report: LinkReport | None = None  # of the group that last formed, as rank 0 found it

    @property
    def request(self) -> ClusterRequest:
        return self._request

    @property
    def all_ranks(self) -> range:
        return range(self._request.workers)

    @property
    def is_alive(self) -> bool:
        """Whether its workers can be asked: if need be, by others in their places."""
        return not self._ended

    @property
    def config(self) -> ParallelConfig | None:
        """Of the process group, while it is whole."""
        return self._config

    @property
    def is_broken(self) -> bool:
        """Whether ranks are known to be gone or out of step. The next call that mends forms the group anew."""
        return self._broken

    def end(self) -> None:
        """End the workers."""
        self._ended = True
        for actor in self._actors:
            self._driver.end_worker(actor)
        self._meetings.close()

    # ---- calling

    def share(self, control: StepControl) -> RankControl:
        """What ranks are sent for the numbers of a step."""
        return self._meetings.share(control)

    def start(self, rank: int, call: Call[Worker, _Result]) -> Answer:
        """Have a worker run a call after what it is doing. Nobody waits for it."""
        return self._driver.call(self._actors[rank], call)

    def _start_each(self, calls: Mapping[int, Call[Worker, Any]], by_line: bool = False) -> dict[int, Answer]:
        """`start`, for several ranks. What all are asked alike is sent once. by_line: see `RayDriver.call_each`."""
        one = next(iter(calls.values()), None)
        if one is None or any(call is not one for call in calls.values()):
            return {rank: self.start(rank, call) for rank, call in calls.items()}
        return dict(zip(calls, self._driver.call_each([self._actors[rank] for rank in calls], one, by_line)))

    def start_and_keep(self, rank: int, call: Call[Worker, _Result]) -> tuple[Answer, Kept]:
        """The same, with what the call gives left in Ray's store, to be handed to others. `collect` says whether it went well."""
        return self._driver.call_and_keep(self._actors[rank], call)

    def wait(self, answers: Sequence[Answer], timeout_s: float) -> list[Answer]:
        """Those that have come, as soon as one has."""
        return self._driver.wait(answers, timeout_s)

    def poll(self) -> None:
        """See `polling`."""
        if self._poll is not None:
            self._poll()

    def note_broken(self) -> None:
        """A worker is gone, or does not answer: `ensure_whole` replaces it."""
        self._broken = True

    def disband(self) -> None:
        """The ranks may be out of step: one has exchanged less than the others. They form their group anew when it is needed."""
        self._config = None
        self.tell_all(ask(Worker.leave, after_failure=True))

    def abandon(self, answers: Mapping[int, Answer], what: str, timeout_s: float) -> None:
        """Leave calls of single workers to themselves. What comes next waits for them."""
        self._abandoned = _CallsUnderWay(answers, what, timeout_s, self._request.workers, is_collective=False)

    def collect(self, rank: int, answer: Answer, what: str) -> None:
        """Wait for what was started by itself. Raises as `run`."""
        calls = _CallsUnderWay(
            {rank: answer}, what, self._request.call_timeout_s, self._request.workers, is_collective=False
        )
        self._collect(calls)

    def tell_all(self, call: Call[Worker, object]) -> None:
        """Have all workers run a call after what they are doing. Nothing is waited for, nor reported."""
        if self.is_alive:
            self._start_each(dict.fromkeys(self.all_ranks, call))

    def run(
        self,
        calls: Mapping[int, Call[Worker, _Result]],
        what: str,
        timeout_s: float | None = None,
        control: StepControl | None = None,
        is_watched: bool = False,
        block_s: float = 0.0,
        alone: bool = False,
    ) -> dict[int, _Result]:
        """Have ranks run a call each, and wait. Returns what each gave, by rank.

        what: the work, for messages. timeout_s: None stands for the request's limit of a call. control: which the calls have,
        too. is_watched: whether a rank that enters no block is stuck; block_s: see `_CallsUnderWay`. alone: a call of a group is
        one worker's, and the group has no part in it.
        Raises as `outcomes.results`; after RanksDisagree, WorkerDied and WorkerStuck the group has to be mended.
        """
        is_collective = not alone and any(call.kind is CallKind.COLLECTIVE for call in calls.values())
        answers = self._start_each(calls, by_line=control is not None)
        num_ranks = len(calls) if is_collective else self._request.workers
        timeout_s = self._request.call_timeout_s if timeout_s is None else timeout_s
        calls_under_way = _CallsUnderWay(
            answers, what, timeout_s, num_ranks, is_collective, control, is_watched, block_s
        )
        return self._collect(calls_under_way)

    def run_on(self, ranks: Sequence[int], call: Call[Worker, _Result], what: str) -> dict[int, _Result]:
        """`run` with the same call for some ranks."""
        return self.run(dict.fromkeys(ranks, call), what)

    def run_whole(self, call: Call[Worker, _Result], what: str) -> dict[int, _Result]:
        """`run` with the same call for all ranks, which are mended first; again after a failure of theirs."""

        def work() -> dict[int, _Result]:
            self.ensure_whole()
            return self.run_on(self.all_ranks, call, what)

        return self.repeated(work, what)

    @contextlib.contextmanager
    def polling(self, poll: Callable[[], None] | None) -> Iterator[None]:
        """Within the `with`, whatever is waited for can be ended by what this raises; it is called about ten times a second.

        poll: None leaves it to what was said before.
        """
        before, self._poll = self._poll, poll or self._poll
        try:
            yield
        finally:
            self._poll = before

    def _collect(self, calls: _CallsUnderWay) -> dict[int, Any]:
        progress = self._progress_of(calls)
        try:
            outcomes = wait_for_outcomes(
                self._driver, calls.answers, calls.timeout_s, self._poll, calls.control, progress
            )
        except Stuck as stuck:
            self._broken = True
            assert progress is not None and calls.control is not None
            calls.control.abort()
            self._log_stacks(stuck.ranks)
            told = [f"rank {rank}, in block {progress.where(rank)}" for rank in sorted(stuck.ranks)]
            raise WorkerStuck(
                f"{calls.what}: no progress for {max(stuck.ranks.values()):.0f} s of {listed(told)} of {calls.num_ranks}"
            ) from None
        except BaseException:
            # Interrupted: they stop at the next block, or go on with what they were given. What comes next waits for them.
            if calls.control is not None:
                calls.control.cancel()
            self._abandoned = calls
            raise
        try:
            return results(outcomes, tuple(calls.answers), calls.num_ranks, calls.what, calls.timeout_s)
        except StepCancelled:
            raise
        except (RanksFailedAlike, OutOfMemory):
            if len(outcomes) < len(calls.answers) and not calls.is_collective:
                self._abandoned = calls  # the others go on by themselves; what comes next waits for them
            elif len(outcomes) < len(calls.answers):
                self._broken = True  # a rank waits for one that ran out of memory, and notices nothing
            elif calls.is_collective:
                # Nobody is out of step, but a rank that fails in a collective call leaves its group. On a GPU one that has
                # answered may have kernels that wait for others: they end before anything synchronises with the device.
                self.disband()
            raise
        except ClusterError:
            self._broken = True
            if calls.control is not None:
                calls.control.abort()
            raise

    def _progress_of(self, calls: _CallsUnderWay) -> Progress | None:
        if calls.control is None or not calls.is_watched:
            return None
        least_s = max(self._request.block_timeout_s, calls.block_s)
        return Progress(calls.control, least_s, self._request.call_timeout_s)

    def _log_stacks(self, ranks: Collection[int]) -> None:
        """Write to the log what ranks are doing, as far as they can say it still."""
        if not self._driver.shares_memory or self._infos is None:
            return
        pids = {rank: self._infos[rank].pid for rank in ranks}
        for pid in pids.values():
            with contextlib.suppress(OSError):
                os.kill(pid, STACK_SIGNAL)
        time.sleep(_STACK_S)
        for rank, pid in pids.items():
            stack = stack_of(self._driver.folder, pid)
            logger.warning("rank %d: %s", rank, stack or "says nothing: its process is stopped, or stuck in the system")

    def workers(self) -> list[WorkerInfo]:
        """Who the workers are, by rank. Waits for them to have started, and starts others where one did not."""

        def started() -> list[WorkerInfo]:
            self.ensure_whole()
            return self._started()

        return self.repeated(started, "starting the workers", repeats=1)

    def _started(self) -> list[WorkerInfo]:
        if self._infos is None:
            starting = _CallsUnderWay(
                self._preparing,
                "starting the workers",
                self._request.call_timeout_s,
                self._request.workers,
                is_collective=False,
            )
            try:
                infos = self._collect(starting)
            except (ClusterError, UserError) as error:
                # What they have answered stays what it is: others have to start in their places.
                self._broken = self._start_failed = True
                new = self._lacking or self.all_ranks
                # Where none of those that were started comes up, it is Ray that hangs.
                self._ray_hangs = isinstance(error, WorkerStuck) and not any(
                    self._preparing[rank].is_done for rank in new
                )
                raise
            self._infos = [infos[rank] for rank in self.all_ranks]
        return self._infos

    def _prepare(self, rank: int) -> Answer:
        return self.start(rank, ask(Worker.prepare, self._request.host, self._request.bootstrap))

    # ---- the process group

    def form(self, config: ParallelConfig) -> None:
        """Let the first `config.world_size` workers form the process group. Does nothing if they have.

        Raises ParallelConfigError if there are not as many workers.
        """
        config.check_workers(self._request.workers)
        self._settle()
        if self._broken:
            self._config = config
            self._mend()
        elif config != self._config:
            self._join(config)

    def with_shares(self, config: ParallelConfig) -> ParallelConfig:
        """The config with shares by the devices' speeds, if they are unlike and it has none. Waits for the workers."""
        devices = self._devices()
        if config.shares or len(set(devices[: config.world_size])) == 1:
            return config
        are_new = devices not in self._speeds
        try:
            speeds = self.speeds()[: config.world_size]
        except OutOfMemory as error:
            logger.warning("no memory to measure the devices, so each rank gets as much: %s", first_line(error))
            return config
        shares = shares_by_speed(speeds)
        if are_new:
            told = ", ".join(f"{speed / 1e12:.1f} on rank {rank}" for rank, speed in enumerate(speeds))
            logger.info("unlike devices (TFLOP/s: %s): shares %s", told, shares or "alike")
        return dataclasses.replace(config, shares=shares)

    def speeds(self) -> list[float]:
        """What each rank's device multiplies in a second, measured once. Waits for the workers."""
        devices = self._devices()
        if devices not in self._speeds:
            found = self.run_whole(ask(Worker.speed), "measuring the devices")
            self._speeds[devices] = [found[rank] for rank in self.all_ranks]
        return self._speeds[devices]

    def _devices(self) -> tuple[str, ...]:
        """What each rank's device is. Waits for the workers."""
        return tuple(worker.device_description for worker in self.workers())

    def _join(self, config: ParallelConfig) -> None:
        """Form the group, with peer-to-peer copies off where the ranks cannot reach each other otherwise."""
        self._started()
        meeting_point = self._meeting_point()
        try:
            self._form_and_try(config, meeting_point)
        except (ExchangeError, RanksDisagree, RanksFailedAlike, WorkerStuck) as error:
            off = self._request.kind.peer_to_peer_off
            if not off or self._without_peer_to_peer:
                raise
            logger.warning(
                "%s. Starting the workers again without peer-to-peer copies (%s), which some boards corrupt or let hang: "
                "ACS or the IOMMU is on, as the firmware's settings and the kernel's command line say. It is slower so",
                error, ", ".join(f"{name}={value}" for name, value in off),
            )  # fmt: skip
            self._without_peer_to_peer = True
            self._replace(list(self.all_ranks))
            self._form_and_try(config, self._meeting_point())
            if isinstance(error, WorkerStuck) or ExchangeError.__name__ in f"{type(error).__name__} {error}":
                self._record.remember_no_peer_to_peer()

    def _meeting_point(self) -> MeetingPoint:
        """Where the ranks can form a group. None of them is in one."""
        self._config = None
        # All at once: taking a group's communicators apart may wait for every rank of it.
        self.run_on(self.all_ranks, ask(Worker.leave), "leaving the group")
        return self._meetings.next_point()

    def _form_and_try(self, config: ParallelConfig, meeting_point: MeetingPoint) -> None:
        # Longer than a step may take: of a rank that hangs, this process is to hear first, and says which it is.
        timeout_s = _COLLECTIVE_TIMEOUT * max(self._request.step_timeout_s, self._request.call_timeout_s)
        joining = {rank: ask(Worker.join, rank, config, meeting_point, timeout_s) for rank in range(config.world_size)}
        reports = self.run(joining, "forming the group", min(_JOIN_TIMEOUT_S, self._request.call_timeout_s))
        if (report := reports[0]) is not None:
            logger.info("%d ranks reach each other: %s", config.world_size, report)
        self.link_report = report
        self._config = config
        self._broken = False

    # ---- after failures

    def repeated(
        self,
        work: Callable[[], _Result],
        what: str,
        repeats: int = 2,
        again: tuple[type[ClusterError], ...] = (ClusterError,),
    ) -> _Result:
        """What some work gives that mends the group first. After a failure of the group it is done again, so often at most.

        again: the failures after which it is.
        Raises the last failure; at once what every rank raised, and out of memory, which would come again.
        """
        for attempt in itertools.count():
            try:
                return work()
            except ClusterError as error:
                is_final = isinstance(error, (RanksFailedAlike, OutOfMemory)) or not isinstance(error, again)
                if self._ended or is_final or attempt == repeats:
                    raise
                logger.warning("%s; repeating %s", first_line(error, _LONGEST_LINE), what)
                logger.debug("%s", error)  # with the rank's traceback
        raise AssertionError("unreachable")

    def ensure_whole(self) -> None:
        """Wait for what was interrupted, and replace workers that are known to be gone."""
        self._settle()
        if self._broken:
            self._mend()

    def _settle(self) -> None:
        """Wait for calls that were interrupted, so that no rank is in an older step than another."""
        if self._ended:
            raise ClusterError("the workers were ended")
        if self._abandoned is not None:
            calls, self._abandoned = self._abandoned, None
            limit_s = self._request.step_timeout_s if calls.is_watched else calls.timeout_s
            calls = dataclasses.replace(calls, what=f"{calls.what}, interrupted", timeout_s=limit_s)
            try:
                self._collect(calls)
            except StepCancelled:
                pass
            except RayLTXError as error:  # nobody waits for that any more; a broken group is noted
                logger.warning("%s", first_line(error, _LONGEST_LINE))

    def _mend(self) -> None:
        """Replace workers that died or do not answer, give the new ones the models, and form the group anew."""
        started = time.monotonic()
        config, self._config = self._config, None
        restarted = not self._driver.is_running or self._ray_hangs or (self._start_failed and not self._driver.has_room)
        if restarted:
            self._driver.restart()
        gone = list(self.all_ranks) if restarted else self._gone()
        self._replace(gone)
        self._broken = False
        if config is not None:
            self._join(config)
        replaced = f"replaced rank {', '.join(map(str, gone))}" if gone else "no worker was lost"
        replaced = "started Ray again" if restarted else replaced
        logger.warning("the group was formed anew in %.1f s (%s)", time.monotonic() - started, replaced)

    def _replace(self, ranks: Sequence[int]) -> None:
        """Start workers in others' places, and give them the models."""
        self._broken = True  # until they are whole, whatever happens on the way
        for rank in ranks:
            self._driver.end_worker(self._actors[rank])
            self._actors[rank] = self._start_worker(rank, self._without_peer_to_peer)
            self._preparing[rank] = self._prepare(rank)
        self._infos = None
        self._start_failed = self._ray_hangs = False  # where it had, all are replaced
        self._lacking.update(ranks)
        self._started()
        self._reload(sorted(self._lacking))
        self._lacking.clear()

    def _gone(self) -> list[int]:
        """The ranks to replace. The others have left the group."""
        if not self._request.on_cpu or self._start_failed:
            return list(self.all_ranks)  # a communicator in an unknown state can hang its process at any time
        pings = {rank: self.start(rank, ask(Worker.leave)) for rank in self.all_ranks}
        # One that is starting still answers when it has started, which is waited for with its own limit.
        starting = {rank for rank, answer in self._preparing.items() if not answer.is_done}
        return [
            rank
            for rank, ping in pings.items()
            if rank not in starting and is_gone(self._driver, ping, _PING_TIMEOUT_S)
        ]
