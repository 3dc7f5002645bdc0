"""The workers of this process: started once, kept, and given models."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Mapping, Sequence

import torch

from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.distributed_worker.driver.link import RayDriver
from rayltx.distributed_worker.driver.protocol import LOCAL
from rayltx.distributed_worker.machine_checks import check_machine, differing_cards
from rayltx.distributed_worker.messages import Refer
from rayltx.distributed_worker.object_store import StoreBudget, object_store_bytes
from rayltx.distributed_worker.rank_group import RankGroup
from rayltx.distributed_worker.remote_model import RemoteModel
from rayltx.distributed_worker.request import ClusterRequest, ModelSource
from rayltx.distributed_worker.sending import Sending
from rayltx.distributed_worker.weight_sharing import Progress, SharedWeights
from rayltx.distributed_worker.worker import Worker, WorkerInfo
from rayltx.distributed_worker.worker_calls import ask
from rayltx.distributed_worker.worker_start import ray_settings, start_worker

logger = logging.getLogger(__name__)


class Cluster:
    """The workers, the group that they form, and the models that they hold.

    `start` returns at once, while the workers come up; whatever needs them waits.
    """

    _current: Cluster | None = None  # the devices are for one

    def __init__(self, request: ClusterRequest) -> None:
        self.request = request
        self._gpus = request.gpus()
        self.driver = RayDriver(ray_settings(request))
        self.store = StoreBudget(lambda: self.driver.store_bytes(request.call_timeout_s))
        start = functools.partial(start_worker, self.driver, request, self._gpus)
        try:
            self.group = RankGroup(request, self.driver, start, self._reload)
        except BaseException:
            self.driver.close()
            raise
        self.sending = Sending(self.driver)
        self._models: dict[str, RemoteModel] = {}
        self._numbers = itertools.count()

    @classmethod
    def start(cls, request: ClusterRequest) -> Cluster:
        """The running cluster if it serves this request, or a new one in its place.

        Raises DeviceError for devices that are not there, before anything is started or stopped.
        """
        current = cls._current
        if current is not None and current.request == request and current.is_alive():
            return current
        check_machine(request)
        if differing := differing_cards(request):
            logger.warning("%s", differing)
        if request.address == LOCAL:
            object_store_bytes(request.object_store_bytes, request.kept_shared_memory)
        if current is not None:
            if current.is_alive():
                logger.warning(
                    "ending the %d workers, for others that differ in %s. A graph with two nodes that start workers and differ "
                    "does this in every run, and loads its models again: give them the same settings",
                    current.request.workers, ", ".join(request.differences(current.request)),
                )  # fmt: skip
            current.shutdown()
        cls._current = cls(request)
        return cls._current

    @classmethod
    def current(cls) -> Cluster | None:
        return cls._current

    def rank_on_gpu(self, index: int) -> int | None:
        """Which worker runs on a GPU of this machine, by its number in this process; None if none does."""
        visible = self.request.kind.visible()
        if index >= len(visible) or visible[index] not in self._gpus:
            return None
        return self._gpus.index(visible[index])

    def rank_on(self, device: torch.device) -> int | None:
        """Which worker runs on a device of this process; None if none does."""
        if self.request.on_cpu or device.type != self.request.device:
            return None
        return self.rank_on_gpu(device.index or 0)

    def is_alive(self) -> bool:
        return self.group.is_alive

    def has_workers(self) -> bool:
        """Whether there are workers now: after Ray has ended there are none, until something is asked of them."""
        return self.is_alive() and self.driver.is_running

    def workers(self) -> list[WorkerInfo]:
        """Who the workers are, by rank. Waits for them to have started."""
        return self.group.workers()

    def shutdown(self) -> None:
        """End the workers, and Ray if it was started here. May be called twice."""
        if Cluster._current is self:
            Cluster._current = None
        for model in list(self._models.values()):
            model.forget()
        self.sending.clear()
        self.group.end()
        self.driver.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    # ---- models

    def load(
        self,
        checkpoint: Checkpoint,
        spec: object,
        host: str = "",
        dtypes: Mapping[str, torch.dtype] | None = None,
        progress: Progress | None = None,
        keeps_host_copy: bool = False,
        refer: Refer | None = None,
    ) -> RemoteModel:
        """Load a checkpoint on every worker, from one copy in this machine's memory.

        host: "" stands for the request's. The rest as in `ModelSource`, and `Progress`.
        """
        source = ModelSource(checkpoint, spec, host or self.request.host, dtypes or {}, keeps_host_copy, refer)
        return self.load_source(source, progress)

    def load_source(self, source: ModelSource, progress: Progress | None = None) -> RemoteModel:
        """`load`, of what another cluster may have loaded before."""
        model_id = f"model-{next(self._numbers)}"
        weights = SharedWeights(source, model_id, self.group, self.store)
        model = RemoteModel(source, model_id, self.group, weights, self.sending, self._forget)

        def load() -> None:
            self.group.workers()
            model.load_on(self.group.all_ranks, progress)

        try:
            self.group.repeated(load, "loading")
        except BaseException:
            model.release_unless_busy()  # whoever cancels does not wait for it
            raise
        self._models[model_id] = model
        return model

    def _reload(self, ranks: Sequence[int]) -> None:
        """Give every model to workers that took others' places. One that cannot be given again is lost, and no other."""
        for model in list(self._models.values()):
            model.load_again_on(ranks)

    def _forget(self, model_id: str) -> None:
        self._models.pop(model_id, None)

    # ---- memory

    def held_bytes(self) -> int:
        """What weights take of the object store."""
        return self.store.held_bytes

    def memory(self) -> list[int]:
        """Each worker's share of physical memory in bytes (PSS)."""
        return list(self.group.run_whole(ask(Worker.memory), "measuring memory").values())
