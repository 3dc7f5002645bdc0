"""A model that the workers hold: loaded, asked, and let go."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rayltx.distributed_worker.host import Host
from rayltx.distributed_worker.meeting import RankControl
from rayltx.distributed_worker.messages import Message, Store, pack, unpack
from rayltx.distributed_worker.rank_group import RankGroup
from rayltx.distributed_worker.request import ModelSource
from rayltx.distributed_worker.sending import Sending
from rayltx.distributed_worker.spreading import Spread
from rayltx.distributed_worker.step_control import StepControl
from rayltx.distributed_worker.weight_sharing import Progress, SharedWeights
from rayltx.distributed_worker.worker import Worker
from rayltx.distributed_worker.worker_calls import Call, CallKind, ask, ask_together
from rayltx.errors import CheckpointError, ClusterError, OutOfMemory, RanksFailedAlike, UserError, first_line
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_HostClass = TypeVar("_HostClass", bound=Host)
_Result = TypeVar("_Result")


class RemoteModel:
    """A model that the workers hold. `Cluster.load` makes it.

    sending: how tensors reach the workers, those of all models.
    on_forgotten: called with the model's id when the workers need not have it any more.
    """

    def __init__(
        self,
        source: ModelSource,
        model_id: str,
        group: RankGroup,
        weights: SharedWeights,
        sending: Sending,
        on_forgotten: Callable[[str], None],
    ) -> None:
        self.source, self.model_id, self.weights = source, model_id, weights
        self._group, self._sending, self._on_forgotten = group, sending, on_forgotten
        self._setups: dict[str, Call[Worker, object]] = {}  # by key, in the order in which they were made
        self._forgotten = False
        self._lost: str | None = None  # why the workers do not have it any more
        self._usual_kind: object = None  # of the last step,
        self._usual_s = 0.0  # and what a block of it took

    @property
    def call_timeout_s(self) -> float:
        """The request's limit of a call that is not a step."""
        return self._group.request.call_timeout_s

    # ---- loading

    def load_on(self, ranks: Sequence[int], progress: Progress | None = None) -> None:
        """Build the model on some workers, give them its weights, and repeat its setups there."""
        if not ranks or self._forgotten:
            return
        source, what = self.source, f"loading {os.path.basename(self.source.checkpoint.path)}"
        self._group.run_on(ranks, ask(Worker.build, self.model_id, source.host, source.spec), what)
        self.weights.give_to(ranks, what, progress)
        self._group.run_on(ranks, ask(Worker.finish_loading, self.model_id), what)
        for setup in self._setups.values():
            self._group.run_on(ranks, setup, what)
        if progress is not None:
            progress(source.weight_bytes, source.weight_bytes)

    def load_again_on(self, ranks: Sequence[int]) -> None:
        """`load_on`, on workers that took others' places. What cannot be had again ends this model, and no other.

        Raises as `load_on` where workers failed, not where the file or the model did.
        """
        try:
            self.load_on(ranks)
        except (UserError, RanksFailedAlike, OutOfMemory) as error:
            reason = first_line(error)
            self._lost = f"{os.path.basename(self.source.checkpoint.path)} could not be loaded again: {reason}"
            logger.error("%s", self._lost)
            self.release_unless_busy()

    def release(self) -> None:
        """Let the workers forget the model. Its memory is free when this returns, unless the log says that some failed in it.

        These, and those that are gone, are found by the next call. Raises what all of them raised.
        """
        try:
            if not self._forgotten and not self._group.is_broken:
                self._group.run_on(self._group.all_ranks, ask(Worker.release, self.model_id), "releasing a model")
        except RanksFailedAlike:
            raise
        except ClusterError as error:
            logger.warning("%s", first_line(error))
        finally:
            self.forget()

    def release_unless_busy(self) -> None:
        """Release from another thread. Nothing is waited for, and a cluster that is gone has nothing to release."""
        if not self._forgotten:
            self._group.tell_all(ask(Worker.release, self.model_id))
        self.forget()

    def forget(self) -> None:
        """Hold nothing for the workers any more. They are not told."""
        self._forgotten = True
        self.weights.let_go()
        self._on_forgotten(self.model_id)

    # ---- calls

    def forward(
        self, inputs: object, config: ParallelConfig, poll: Callable[[], None] | None = None, repeats: int = 2
    ) -> Any:
        """One step: `Host.forward` by the ranks of a group. inputs: what the host takes. Otherwise as `call_together`."""
        return self.call_together(ask_together(Host.forward, inputs), config, poll=poll, repeats=repeats)

    def call_together(
        self,
        call: Call[_HostClass, _Result],
        config: ParallelConfig,
        what: str = "the step",
        timeout_s: float | None = None,
        poll: Callable[[], None] | None = None,
        repeats: int = 2,
        again: tuple[type[ClusterError], ...] = (ClusterError,),
        ranks: int | None = None,
    ) -> _Result:
        """Have the ranks of a group run a host's call together. Returns rank 0's result.

        Tensors in the arguments may be anywhere, and travel once for as long as they stay the same.
        timeout_s: None stands for the request's limit of a step. poll: see `wait_for_outcomes`; raising in it cancels.
        ranks: so many of the first run it, as a group of their own: of the config's `halves`. None: all. The group of all stays.
        A call that failed because a rank died, hung or failed alone is repeated, by a group that was mended, up to
        `repeats` times; again: after which of these failures. Raises as `outcomes.results`.
        """
        answers = self._together(call, config, what, timeout_s, poll, repeats, again, ranks=ranks)
        return unpack(answers[0])

    def disband(self) -> None:
        """See `RankGroup.disband`."""
        self._group.disband()

    def forward_on_each(
        self, inputs: object, config: ParallelConfig, what: str = "the step", poll: Callable[[], None] | None = None
    ) -> list[Any]:
        """`forward`, of a host whose ranks have a part of the answer each, and whose blocks are not alike. Returns the parts.

        A rank may stay in a block for as long as the request's limit of a call says.
        """
        answers = self._together(
            ask_together(Host.forward, inputs),
            config,
            what,
            poll=poll,
            from_all=True,
            block_s=self._group.request.call_timeout_s,
        )
        return [unpack(answers[rank]) for rank in range(config.world_size)]

    def _together(
        self,
        call: Call[_HostClass, Any],
        config: ParallelConfig,
        what: str,
        timeout_s: float | None = None,
        poll: Callable[[], None] | None = None,
        repeats: int = 2,
        again: tuple[type[ClusterError], ...] = (ClusterError,),
        from_all: bool = False,
        block_s: float = 0.0,
        ranks: int | None = None,
    ) -> dict[int, Message]:
        group, alone = self._group, ranks == 1
        # A rank may stay in one block for as long as a block's limit says.
        longest_s = max(group.request.step_timeout_s, group.request.block_timeout_s)
        limit_s = longest_s if timeout_s is None else timeout_s

        def work() -> dict[int, Message]:
            group.form(config)
            self._check_not_lost()
            asked = range(config.world_size if ranks is None else ranks)
            control = StepControl(len(asked))
            shared = group.share(control)
            worker_call = self._on_worker(call, self._sending.of_steps, control=shared, from_all=from_all, ranks=ranks)
            calls = dict.fromkeys(asked, worker_call)
            if call.method != Host.forward.__name__:
                return group.run(calls, what, limit_s, control, alone=alone)
            kind = config, ranks, _shapes_of(worker_call)
            control.usual_s = self._usual_s if kind == self._usual_kind else 0.0
            answers = group.run(calls, what, limit_s, control, is_watched=True, block_s=block_s, alone=alone)
            self._usual_kind, self._usual_s = kind, control.usual_s
            return answers

        with group.polling(poll):  # also of what has to be waited for before
            return group.repeated(work, what, repeats, again)

    def call(
        self,
        call: Call[_HostClass, _Result],
        what: str,
        ranks: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> dict[int, _Result]:
        """Have some workers, or all, run a host's call by themselves. Returns what each gave, by rank.

        timeout_s: None stands for the request's limit of a call.
        """
        asked = self._group.all_ranks if ranks is None else ranks
        answers: dict[int, Message] = self._run(self._on_worker(call), what, asked, timeout_s)
        return {rank: unpack(answer) for rank, answer in answers.items()}

    def spread(
        self, calls: Iterable[Call[_HostClass, _Result]], what: str, poll: Callable[[], None] | None = None
    ) -> Iterator[_Result]:
        """Have workers run a host's calls, each whichever is free. Gives what they give, in the calls' order.

        A call may take as long as a step. Raises as `Spread`.
        """
        self._check_not_lost()
        on_workers = (self._on_worker(call, self._sending.of_setups) for call in calls)  # none of which is sent again
        with self._group.polling(poll):
            yield from Spread(self._group, on_workers, what, self._group.request.step_timeout_s)

    def tell(self, call: Call[_HostClass, object]) -> None:
        """Have all workers run a host's call after what they are doing. Nothing is waited for, nor reported."""
        self._group.tell_all(self._on_worker(call))

    def set_up(self, key: str, call: Call[_HostClass, None], what: str, as_views: bool = False) -> None:
        """Have every worker run a host's call, and again each one that takes another's place later.

        key: a later setup with the same key takes this one's place. as_views: see `Message`; large tensors are in memory
        once for all workers of a machine either way.
        """
        worker_call = self._on_worker(call, self._sending.of_setups, as_views)
        self._run(worker_call, what, self._group.all_ranks)
        self._setups.pop(key, None)
        self._setups[key] = worker_call

    def forget_setups(self, prefix: str) -> None:
        """Repeat no setup any more whose key begins so."""
        for key in [key for key in self._setups if key.startswith(prefix)]:
            del self._setups[key]

    def digest(self) -> dict[int, str]:
        """SHA-256 of the parameters that each worker sees, by rank."""
        return self._run(ask(Worker.digest, self.model_id), "hashing", self._group.all_ranks)

    def _run(
        self, call: Call[Worker, _Result], what: str, ranks: Sequence[int], timeout_s: float | None = None
    ) -> dict[int, _Result]:
        def work() -> dict[int, _Result]:
            self._group.ensure_whole()
            self._check_not_lost()
            return self._group.run(dict.fromkeys(ranks, call), what, timeout_s)

        return self._group.repeated(work, what)

    @property
    def is_lost(self) -> bool:
        """Whether it could not be given to workers that took others' places."""
        return self._lost is not None

    def _check_not_lost(self) -> None:
        if self._lost is not None:
            raise CheckpointError(f"{self._lost}; load the model again")

    def _on_worker(
        self,
        call: Call[_HostClass, Any],
        store: Store | None = None,
        as_views: bool = False,
        control: RankControl | None = None,
        from_all: bool = False,
        ranks: int | None = None,
    ) -> Call[Worker, Any]:
        """A host's call as the worker is asked it."""
        arguments = pack((call.args, call.kwargs), store, self.source.refer, as_views)
        if call.kind is CallKind.COLLECTIVE:
            return ask(Worker.call_host_together, self.model_id, call.method, arguments, control, from_all, ranks)
        return ask(Worker.call_host, self.model_id, call.method, arguments)


def _shapes_of(call: Call[Worker, Any]) -> list[object]:
    """By which steps that take alike long are known: the dtypes and shapes of the tensors that they are sent."""
    return [(wire.dtype, wire.shape) for arg in call.args if isinstance(arg, Message) for wire in arg.tensors]
