"""What the workers hold on their devices for one model: put there, measured, given back, and done without."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import comfy.model_management
import torch

from rayltx.comfy_dist.comfy_host import ComfyHost
from rayltx.comfy_dist.comfy_types import BaseModel
from rayltx.comfy_dist.main_process.memory_estimate import Replicated, bytes_of_sharing
from rayltx.comfy_dist.main_process.memory_saving import MemorySaving, advice
from rayltx.comfy_dist.main_process.other_devices import OtherDevices, devices_elsewhere
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.model_spec import ComfySpec
from rayltx.comfy_dist.wire import LoadInputs
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.remote_model import RemoteModel
from rayltx.distributed_worker.worker_calls import ask
from rayltx.errors import OutOfMemory
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class ModelOnWorkers(Protocol):
    """A model, and where it is now."""

    placement: Placement
    cluster: Cluster
    remote: RemoteModel
    spec: ComfySpec

    @property
    def base_model(self) -> BaseModel: ...


class DeviceMemory:
    """The memory of the workers' devices, as far as one model is concerned."""

    def __init__(self, model: ModelOnWorkers) -> None:
        self.loaded = False  # whether the workers have the weights on their devices
        self.is_running = False  # whether a sampling run is under way
        self.latent_shape: list[int] = [1, 1, 1, 1, 1]  # of what is about to be sampled
        self.replicated = Replicated()
        self._model = model
        self._run = 0  # their number
        self._saving: MemorySaving | None = None  # for the rest of this run
        self._placed: dict[int, int] = {}  # bytes of weights on each rank's device
        self._other_devices = OtherDevices(self)
        self._free: int | None = None  # on the device that has least, in this run

    @property
    def _ranks(self) -> range:
        """The workers that have a part in the model."""
        return range(self._model.placement.config.world_size)

    def begin_run(self) -> None:
        """A sampling run begins, for which ComfyUI has loaded the model."""
        self.is_running = True

    def free_bytes(self) -> int:
        """What a step can have of the memory of the device that has least, as it was when it was first asked in this run.

        By it ComfyUI decides at each step whether positive and negative go in one batch: once a run, then, for a batch's
        numbers are others in the last bits, and what steps leave in a worker's cache looks taken from here.
        """
        if self._free is None:
            self._free = min(self._model.remote.call(ask(ComfyHost.free_bytes), "measuring", self._ranks).values())
        return self._free

    def text_on_one(self, work: Callable[[MemorySaving | None], _Result]) -> _Result:
        """`within`, for what prepares text on one worker. Outside of a run it leaves nothing on that worker's device."""
        loaded = self.loaded
        try:
            return self.within(work)
        finally:
            if not loaded:
                self._model.remote.tell(ask(ComfyHost.unload))

    def bytes_of_sharing(self, shape: Sequence[int], config: ParallelConfig | None = None) -> int:
        """Bytes that a rank of the model's config, or another, needs for a latent besides its share of ComfyUI's estimate."""
        element_bytes = self._model.spec.compute_dtype.itemsize
        config = config or self._model.placement.config
        return bytes_of_sharing(self._model.base_model.diffusion_model, shape, config, element_bytes, self.replicated)

    def has_room_on_first(self, ranks: int) -> bool:
        """Whether so many of the first ranks can take what is sampled without the others, by ComfyUI's estimate."""
        config, shape = self._model.placement.config, self.latent_shape
        fewer = config.of_first(ranks)
        of_a_share = self._model.base_model.memory_required(shape) - self.bytes_of_sharing(shape)
        needed = of_a_share / config.largest_share * fewer.largest_share + self.bytes_of_sharing(shape, fewer)
        return needed <= self.free_bytes()

    def put_on_devices(self) -> None:
        """Before a run, as ComfyUI does with a model of its own: what is free next to the weights is known then."""
        self._run, self._saving, self._free = self._run + 1, None, None
        limit_s = self._model.placement.request.step_timeout_s  # the file may have to be read for it

        def load(saving: MemorySaving | None) -> dict[int, int]:
            call = ask(ComfyHost.load, self.load_inputs(saving))
            return self._model.remote.call(call, "putting weights on the devices", self._ranks, limit_s)

        self._placed = self.within(load)
        self.loaded = True
        self._other_devices.list_on(devices_elsewhere(self._model.cluster))

    def within(self, work: Callable[[MemorySaving | None], _Result]) -> _Result:
        """What the work gives. Where memory runs out it is tried once more with less, and so is the rest of the run.

        Raises ComfyUI's own out-of-memory error if that is too much, too.
        """
        try:
            return work(self._saving)
        except OutOfMemory as error:
            short = error
        if self._saving is None:
            placed = self._model.remote.call(ask(ComfyHost.placed_bytes), "measuring", self._ranks)
            weight_bytes = self._model.remote.source.weight_bytes
            most = min(info.device_memory_bytes for info in self._model.cluster.workers())
            self._saving = MemorySaving.after(placed, min(weight_bytes, most), self._model.placement.weight_budget)
            logger.warning("%s; trying again with %s", short, self._saving)
            self._model.remote.call(ask(ComfyHost.unload), "giving memory back")
            try:
                return work(self._saving)
            except OutOfMemory as error:
                short = error
        self._model.remote.call(ask(ComfyHost.unload), "giving memory back")
        raise comfy.model_management.OOM_EXCEPTION(f"{short}. {advice(self._saving)}") from short

    def load_inputs(self, saving: MemorySaving | None = None) -> LoadInputs:
        """By what a worker puts the weights on its device. saving: what it is tried with once more."""
        inputs = LoadInputs(
            run=self._run,
            latent_shape=self.latent_shape,
            weight_budget=self._model.placement.weight_budget,
            share=self._model.placement.config.largest_share,
            sharing_bytes=self.bytes_of_sharing(self.latent_shape),
        )
        return inputs if saving is None else saving.load(inputs)

    def end_run(self, free: bool) -> None:
        """A sampling run is over, or cancelled: nothing is waited for. free: give the devices' memory back."""
        self.is_running = False
        self._model.remote.tell(ask(ComfyHost.unload) if free else ask(ComfyHost.end_run))
        self.loaded = self.loaded and not free

    def unload(self) -> None:
        """Free the devices; the host's copy stays."""
        if self.loaded:
            self.loaded = False
            if self._model.cluster.has_workers():
                self._model.remote.call(ask(ComfyHost.unload), "unloading")

    def unload_bytes(self, device: torch.device, num_bytes: int) -> int:
        """Free at least so many bytes of a device of this process, if a worker has them. Returns how many were freed."""
        rank, before = self._rank_on(device), self.placed_bytes(device)
        if rank is None or not before or not self._model.cluster.has_workers():
            return 0
        self._placed.update(self._model.remote.call(ask(ComfyHost.unload_bytes, num_bytes), "unloading", [rank]))
        return before - self.placed_bytes(device)

    def empty(self, device: torch.device) -> None:
        """Free a device of this process, if a worker has weights there. They return with the next run."""
        rank = self._rank_on(device)
        if rank is not None and self.placed_bytes(device) and self._model.cluster.has_workers():
            self._model.remote.call(ask(ComfyHost.unload), "unloading", [rank])
            self._placed[rank] = 0

    def device_bytes(self, device: torch.device) -> int:
        """What the workers' weights take on a device of this process, when all are there."""
        return 0 if self._rank_on(device) is None else self._model.remote.source.weight_bytes

    def placed_bytes(self, device: torch.device) -> int:
        """What they take there now."""
        rank = self._rank_on(device)
        return self._placed.get(rank, 0) if self.loaded and rank is not None else 0

    def _rank_on(self, device: torch.device) -> int | None:
        return self._model.cluster.rank_on(device)
