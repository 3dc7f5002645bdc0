"""How the workers come by one model's weights: from one copy in this machine's memory, by one of two ways.

Through the object store, rank 0 reads a portion after another, and all workers take each from there. Where the weights
stay views on the portions, these are kept: for nothing, and a worker that has to be replaced finds them there. Otherwise
a GPU's worker has copied a portion when it answers, so it is let go, and the store never holds more than a few.
Where the store is too small, each worker maps the file itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from rayltx.distributed_worker.driver.kept import Kept
from rayltx.distributed_worker.driver.link import Answer
from rayltx.distributed_worker.object_store import StoreBudget
from rayltx.distributed_worker.rank_group import RankGroup
from rayltx.distributed_worker.request import ModelSource
from rayltx.distributed_worker.worker import Worker
from rayltx.distributed_worker.worker_calls import ask

logger = logging.getLogger(__name__)

_PORTIONS_AHEAD = 3  # read ahead of the workers; on GPUs also the most that the store holds

Progress = Callable[[int, int], None]
"""Called with (bytes that all workers have, bytes in all)."""


class SharedWeights:
    """The weights of one model."""

    def __init__(self, source: ModelSource, model_id: str, group: RankGroup, store: StoreBudget) -> None:
        self._source, self._model_id, self._group, self._store = source, model_id, group, store
        self._portions: list[Kept] = []  # those that are kept
        self._from_file = False
        self._names = source.checkpoint.portions
        self._sizes = [sum(source.checkpoint.tensors[name].num_bytes for name in names) for names in self._names]

    @property
    def _stay_shared(self) -> bool:
        """Whether the workers use the one copy for as long as the model lives."""
        return self._group.request.on_cpu or self._source.keeps_host_copy

    def give_to(self, ranks: Sequence[int], what: str, progress: Progress | None = None) -> None:
        """Let workers that have built the model take its weights. what: the work, for messages."""
        if any(not portion.is_there for portion in self._portions):
            self.let_go()  # they went with the Ray that kept them
        if not self._portions and not self._from_file:
            self._from_file = self._group.request.map_files or not self._fits()
        if self._from_file:
            source = self._source
            names = tuple(source.checkpoint.tensors)
            call = ask(Worker.take_file, self._model_id, source.checkpoint, names, source.dtypes)
            self._group.run_on(ranks, call, what)
        elif self._stay_shared:
            if not self._portions:
                self._read_all(what, progress)
            self._group.run_on(ranks, ask(Worker.take_portions, self._model_id, *self._portions), what)
        else:
            self._pass_through(ranks, what, progress)

    def let_go(self) -> None:
        """Hold the weights for no further worker. Views on them live on."""
        self._portions.clear()
        self._store.let_go(self._model_id)

    def _fits(self) -> bool:
        needed = self._source.weight_bytes
        if self._store.fits(needed if self._stay_shared else max(self._sizes) * (_PORTIONS_AHEAD + 1)):
            return True
        logger.warning(
            "the object store (%.2f GiB, %.2f GiB in use) cannot hold %.2f GiB of weights: the workers map the file itself",
            self._store.total_bytes / 2**30,
            self._store.held_bytes / 2**30,
            needed / 2**30,
        )
        return False

    def _read(self, names: Sequence[str]) -> tuple[Answer, Kept]:
        call = ask(Worker.read_portion, self._source.checkpoint, names, self._source.dtypes)
        return self._group.start_and_keep(0, call)

    def _read_all(self, what: str, progress: Progress | None) -> None:
        reading = [self._read(names) for names in self._names]
        for number, (answer, _) in enumerate(reading, start=1):
            self._group.collect(0, answer, what)
            self._report(progress, number)
        self._portions = [portion for _, portion in reading]
        self._store.hold(self._model_id, self._source.weight_bytes)

    def _pass_through(self, ranks: Sequence[int], what: str, progress: Progress | None) -> None:
        reading: list[tuple[Answer, Kept]] = []
        for number in range(len(self._names)):
            reading += [self._read(names) for names in self._names[number + len(reading) : number + _PORTIONS_AHEAD]]
            answer, portion = reading.pop(0)
            self._group.collect(0, answer, what)
            self._group.run_on(ranks, ask(Worker.take_portions, self._model_id, portion), what)
            self._report(progress, number + 1)

    def _report(self, progress: Progress | None, portions: int) -> None:
        if progress is not None:
            progress(sum(self._sizes[:portions]), sum(self._sizes))
