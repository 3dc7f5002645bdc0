"""The workers as ranks: called, waited for, and formed anew when one of them fails."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from rayltx.distributed_worker.machine_record import MachineRecord
from rayltx.distributed_worker.outcomes import is_gone, results, wait_for_outcomes
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.worker import LinkReport, Worker, WorkerInfo
from rayltx.distributed_worker.worker_calls import Call, CallKind, ask
from rayltx.errors import ClusterError, ExchangeError, OutOfMemory, RanksDisagree, RanksFailedAlike, WorkerStuck
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # for everything that is not a step
_PING_TIMEOUT_S = 5.0
_JOIN_TIMEOUT_S = 120.0  # a link that hangs is told from a slow start, which is over by then
_COLLECTIVE_TIMEOUT = 1.5  # of a step's limit

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _CallsUnderWay:
    """What ranks were asked together, and have not answered."""

    references: Mapping[int, ray.ObjectRef]
    what: str
    timeout_s: float
    num_ranks: int  # of the group for a collective call, else of all workers
    is_collective: bool


class RankGroup:
    """All workers, and the process group that the first of them form.

    start_worker: starts the process of a rank, with or without (True) peer-to-peer copies, and returns at once.
    reload: gives models to ranks that were replaced. It may call them, and must not ask for the group to be mended.
    """

    def __init__(
        self,
        request: ClusterRequest,
        start_worker: Callable[[int, bool], ray.actor.ActorHandle],
        reload: Callable[[Sequence[int]], None],
    ) -> None:
        self._request, self._start_worker, self._reload = request, start_worker, reload
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
        self.link_report: LinkReport | None = None  # of the group that last formed, as rank 0 found it

    @property
    def request(self) -> ClusterRequest:
        return self._request

    @property
    def all_ranks(self) -> range:
        return range(self._request.workers)

    @property
    def is_alive(self) -> bool:
        return not self._ended and ray.is_initialized()

    @property
    def is_broken(self) -> bool:
        """Whether ranks are known to be gone or out of step. The next call that mends forms the group anew."""
        return self._broken

    def end(self) -> None:
        """End the workers, unless they went with Ray."""
        self._ended = True
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)

    # ---- calling

    def start(self, rank: int, call: Call[Worker, _Result]) -> ray.ObjectRef:
        """Have a worker run a call after what it is doing. Returns a reference to the `Outcome`, which nobody waits for."""
        # Apart, for Ray to put objects in the place of references among the arguments.
        return self._actors[rank].run.remote(call.method, call.kwargs, *call.args)

    def tell_all(self, call: Call[Worker, object]) -> None:
        """Have all workers run a call after what they are doing. Nothing is waited for, nor reported."""
        if self.is_alive:
            for rank in self.all_ranks:
                self.start(rank, call)

    def run(
        self,
        calls: Mapping[int, Call[Worker, _Result]],
        what: str,
        timeout_s: float = START_TIMEOUT_S,
        poll: Callable[[], None] | None = None,
    ) -> dict[int, _Result]:
        """Have ranks run a call each, and wait. Returns what each gave, by rank.

        what: the work, for messages. poll: see `wait_for_outcomes`.
        Raises as `outcomes.results`; after RanksDisagree, WorkerDied and WorkerStuck the group has to be mended.
        """
        is_collective = any(call.kind is CallKind.COLLECTIVE for call in calls.values())
        references = {rank: self.start(rank, call) for rank, call in calls.items()}
        num_ranks = len(calls) if is_collective else self._request.workers
        return self._collect(_CallsUnderWay(references, what, timeout_s, num_ranks, is_collective), poll)

    def run_on(self, ranks: Sequence[int], call: Call[Worker, _Result], what: str) -> dict[int, _Result]:
        """`run` with the same call for some ranks."""
        return self.run(dict.fromkeys(ranks, call), what)

    def _collect(self, calls: _CallsUnderWay, poll: Callable[[], None] | None = None) -> dict[int, Any]:
        try:
            answers = wait_for_outcomes(calls.references, calls.timeout_s, poll)
        except BaseException:
            # Interrupted: the workers go on with what they were given. What comes next waits for them.
            self._abandoned = calls
            raise
        try:
            return results(answers, tuple(calls.references), calls.num_ranks, calls.what, calls.timeout_s)
        except (RanksFailedAlike, OutOfMemory):
            if len(answers) < len(calls.references) and not calls.is_collective:
                self._abandoned = calls  # the others go on by themselves; what comes next waits for them
            elif len(answers) < len(calls.references):
                self._broken = True  # a rank waits for one that ran out of memory, and notices nothing
            elif calls.is_collective:
                # Nobody is out of step, but a rank that fails in a collective call leaves its group. On a GPU one that has
                # answered may have kernels that wait for others: they end before anything synchronises with the device.
                self._config = None
                self.tell_all(ask(Worker.leave, after_failure=True))
            raise
        except ClusterError:
            self._broken = True
            raise

    def workers(self) -> list[WorkerInfo]:
        """Who the workers are, by rank. Waits for them to have started."""
        if self._infos is None:
            starting = _CallsUnderWay(
                self._preparing, "starting the workers", START_TIMEOUT_S, self._request.workers, is_collective=False
            )
            infos = self._collect(starting)
            self._infos = [infos[rank] for rank in self.all_ranks]
        return self._infos

    def _prepare(self, rank: int) -> ray.ObjectRef:
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

    def _join(self, config: ParallelConfig) -> None:
        """Form the group, with peer-to-peer copies off where the ranks cannot reach each other otherwise."""
        self.workers()
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

    def _meeting_point(self) -> tuple[str, int]:
        """Where the ranks can form a group. None of them is in one."""
        self._config = None
        # All at once: taking a group's communicators apart may wait for every rank of it.
        self.run_on(self.all_ranks, ask(Worker.leave), "leaving the group")
        return self.run_on([0], ask(Worker.open_store, self._request.group_address), "forming the group")[0]

    def _form_and_try(self, config: ParallelConfig, meeting_point: tuple[str, int]) -> None:
        # Longer than a step may take: of a rank that hangs, this process is to hear first, and says which it is.
        timeout_s = _COLLECTIVE_TIMEOUT * self._request.step_timeout_s
        joining = {rank: ask(Worker.join, rank, config, meeting_point, timeout_s) for rank in range(config.world_size)}
        reports = self.run(joining, "forming the group", _JOIN_TIMEOUT_S)
        if (report := reports[0]) is not None:
            logger.info("%d ranks reach each other: %s", config.world_size, report)
        self.link_report = report
        self._config = config
        self._broken = False

    # ---- after failures

    def repeated(self, work: Callable[[], _Result], what: str, repeats: int = 2) -> _Result:
        """What some work gives that mends the group first. After a failure of the group it is done again, so often at most.

        Raises the last failure; at once what every rank raised, and out of memory, which would come again.
        """
        for attempt in itertools.count():
            try:
                return work()
            except ClusterError as error:
                if isinstance(error, (RanksFailedAlike, OutOfMemory)) or attempt == repeats:
                    raise
                logger.warning("%s; repeating %s", error, what)
        raise AssertionError("unreachable")

    def ensure_whole(self) -> None:
        """Wait for what was interrupted, and replace workers that are known to be gone."""
        self._settle()
        if self._broken:
            self._mend()

    def _settle(self) -> None:
        """Wait for calls that were interrupted, so that no rank is in an older step than another."""
        if self._abandoned is not None:
            calls, self._abandoned = self._abandoned, None
            calls = dataclasses.replace(calls, what="an interrupted step", timeout_s=self._request.step_timeout_s)
            try:
                self._collect(calls)
            except Exception as error:  # nobody waits for that step any more; a broken group is noted
                logger.warning("%s", error)

    def _mend(self) -> None:
        """Replace workers that died or do not answer, give the new ones the models, and form the group anew."""
        started = time.monotonic()
        config, self._config = self._config, None
        gone = self._gone()
        self._replace(gone)
        self._broken = False
        if config is not None:
            self._join(config)
        replaced = f"replaced rank {', '.join(map(str, gone))}" if gone else "no worker was lost"
        logger.warning("the group was formed anew in %.1f s (%s)", time.monotonic() - started, replaced)

    def _replace(self, ranks: Sequence[int]) -> None:
        """Start workers in others' places, and give them the models."""
        self._broken = True  # until they are whole, whatever happens on the way
        for rank in ranks:
            ray.kill(self._actors[rank])
            self._actors[rank] = self._start_worker(rank, self._without_peer_to_peer)
            self._preparing[rank] = self._prepare(rank)
        self._infos = None
        self._lacking.update(ranks)
        self.workers()
        self._reload(sorted(self._lacking))
        self._lacking.clear()

    def _gone(self) -> list[int]:
        """The ranks to replace. The others have left the group."""
        if not self._request.on_cpu:
            return list(self.all_ranks)  # a communicator in an unknown state can hang its process at any time
        pings = {rank: self.start(rank, ask(Worker.leave)) for rank in self.all_ranks}
        return [rank for rank, ping in pings.items() if is_gone(ping, _PING_TIMEOUT_S)]
