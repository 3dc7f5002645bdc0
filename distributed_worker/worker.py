"""One rank: a process with a device, a place in the process group, and the models that it runs."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
import torch
import torch.distributed as dist
from ray import cloudpickle

from rayltx.devices import CPU, kind_of
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.distributed_worker.device_speed import flops_per_s
from rayltx.distributed_worker.failure_watch import FailureWatch, abort_group
from rayltx.distributed_worker.freed_memory import give_back_freed_memory
from rayltx.distributed_worker.host import Host
from rayltx.distributed_worker.meeting import MeetingPoint, RankControl, use_interface_of
from rayltx.distributed_worker.messages import (
    AnswerTensors,
    Message,
    Received,
    SharedTensors,
    bytes_of_tensor,
    load_call,
    pack,
    unpack,
)
from rayltx.distributed_worker.object_store import SHARED_MEMORY
from rayltx.distributed_worker.outcomes import Failure, Outcome
from rayltx.distributed_worker.pace import Pace
from rayltx.distributed_worker.request import Bootstrap
from rayltx.distributed_worker.stacks import write_stacks_into
from rayltx.distributed_worker.weights import WeightPortion, map_file
from rayltx.distributed_worker.worker_calls import collective, individual
from rayltx.errors import DeviceError, StepCancelled, UserError
from rayltx.sequence_parallel.first_exchange import ExchangeReport, check_exchange
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig


@dataclass(frozen=True)
class WorkerInfo:
    pid: int
    hostname: str
    device: str
    device_memory_bytes: int
    device_description: str  # see `DeviceKind.description`


@dataclass(frozen=True)
class LinkReport:
    """How the ranks of a group reach each other, as one of them found it."""

    backend: str
    exchange: ExchangeReport
    communicator_bytes: int  # of the device's memory, that forming the group took

    def __str__(self) -> str:
        return (
            f"{self.backend}, {self.exchange.bytes_per_s / 1e9:.2f} GB/s to a rank, {self.exchange.small_s * 1e3:.2f} ms a "
            f"small collective, {self.communicator_bytes / 2**20:.0f} MiB for communicators"
        )


def import_dotted(path: str) -> Any:
    """The object that "package.module:name" names."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


class Worker:
    """Runs in a Ray actor. What it can be asked has a mark (see `worker_calls`), and is asked through `answer`."""

    def __init__(self, device: str, num_threads: int, shared_folder: str = "") -> None:
        """shared_folder: see `RayWorker`."""
        self._device = kind_of(device)
        self._store = SharedTensors() if shared_folder else None
        self._answers = AnswerTensors() if shared_folder else None  # of steps, whose answers are alike
        if shared_folder:
            write_stacks_into(shared_folder)
        else:
            use_interface_of(ray.util.get_node_ip_address())
        self._result: Message | None = None  # kept until the next, for who asked to map what it shares
        self._models: dict[str, Host] = {}
        self._received: dict[str, Received] = {}  # by model, of its steps
        self._group: SequenceParallelGroup | None = None
        # Of the group, which does not keep it itself, and of the one before: threads of NCCL's can outlive their group.
        self._meetings: deque[dist.Store] = deque(maxlen=2)
        self._watch: FailureWatch | None = None
        self._logs = _CollectingHandler()
        package_logger = logging.getLogger("rayltx")
        package_logger.addHandler(self._logs)
        package_logger.setLevel(logging.INFO)
        torch.set_num_threads(num_threads)  # Ray sets OMP_NUM_THREADS=1

    def answer(self, payload: bytes, kept: Sequence[object], keeps: bool = False) -> tuple[bytes, object]:
        """Run one of the other methods. Returns a pickled Outcome, and with `keeps` the result apart from it.

        payload, kept: see `messages.load_call`. What is raised is returned, so that Ray has nothing to wrap.
        """
        result = None
        try:
            call = load_call(payload, kept)
            result = getattr(self, call.method)(*call.args, **call.kwargs)
            return cloudpickle.dumps(Outcome(None if keeps else result, logs=self._logs.drain())), result
        except Exception as error:  # the process boundary
            return cloudpickle.dumps(Outcome(failure=Failure.of(error, self._device), logs=self._logs.drain())), None

    # ---- the process

    @individual
    def prepare(self, host_path: str, bootstrap: Bootstrap | None) -> WorkerInfo:
        """Import a host ahead of its use, and say who this is. Raises what the bootstrap and the import raise."""
        if bootstrap is not None:
            import_dotted(bootstrap.function)(bootstrap.payload, self._device.name)
        import_dotted(host_path)
        return WorkerInfo(
            os.getpid(), socket.gethostname(), self._device.name, self._device.total_bytes(), self._device.description()
        )

    @individual
    def memory(self) -> int:
        """This process's share of physical memory in bytes: PSS, which counts a shared page once among its users."""
        return psutil.Process().memory_full_info().pss

    @individual
    def speed(self) -> float:
        """Multiplications and additions a second of this worker's device."""
        return flops_per_s(self._device)

    # ---- the process group

    @collective
    def join(
        self, rank: int, config: ParallelConfig, meeting_point: MeetingPoint, timeout_s: float
    ) -> LinkReport | None:
        """Form a process group with the other ranks, in place of an earlier one, and try it. Returns None for one rank.

        Raises what torch raises, DeviceError where NCCL finds no room in shared memory, and ExchangeError where other bytes
        arrive than were sent.
        """
        self.leave()
        if config.world_size == 1:
            self._group = SequenceParallelGroup.single()
            return None
        store = meeting_point.join(timeout_s)
        self._meetings.append(store)
        dist.init_process_group(
            self._device.collectives,
            store=store,
            rank=rank,
            world_size=config.world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        free_bytes = self._device.free_bytes()
        try:
            group = SequenceParallelGroup.create(config)
            exchange = check_exchange(group, torch.device(self._device.name), self._device.probe_bytes)
        except RuntimeError as error:
            if str(SHARED_MEMORY) not in str(error):
                raise
            raise DeviceError(
                f"{self._device.collectives} finds no room in {SHARED_MEMORY}, through which it moves data: {error}; enlarge it "
                "(in a container: --shm-size)"
            ) from error
        self._group, self._watch = group, FailureWatch(meeting_point)
        self._device.give_back_memory()  # what was exchanged
        return LinkReport(self._device.collectives, exchange, max(0, free_bytes - self._device.free_bytes()))

    @individual
    def leave(self, after_failure: bool = False) -> None:
        """Leave the process group, if there is one.

        after_failure: do not wait for what is under way. On a GPU kernels may wait there for ranks that will not come, and
        whatever synchronises with the device would wait for them.
        """
        self._group = None
        if self._watch is not None:
            self._watch.close()
        if not dist.is_initialized():
            return
        if after_failure and self._device.name != CPU:
            abort_group()
        else:
            dist.destroy_process_group()

    # ---- weights

    @individual
    def build(self, model_id: str, host_path: str, spec: object) -> None:
        """Make a host without weights. Raises what the host's class raises for the specification."""
        self._models[model_id] = import_dotted(host_path)(spec, self._device.name)

    @individual
    def read_portion(
        self, checkpoint: Checkpoint, names: Sequence[str], dtypes: Mapping[str, torch.dtype]
    ) -> WeightPortion:
        """Read some tensors for all workers. Raises CheckpointError for a file that has changed."""
        return WeightPortion.read(checkpoint, names, dtypes)

    @individual
    def take_portions(self, model_id: str, *portions: Any) -> None:
        """Assign what a worker read: `WeightPortion`s, for which who asks has what stands for them in Ray's store."""
        for portion in portions:
            self._models[model_id].assign(portion.map())

    @individual
    def take_file(
        self, model_id: str, checkpoint: Checkpoint, names: Sequence[str], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        """Assign tensors on this worker's own mapping of the file. Raises CheckpointError for a file that has changed."""
        self._models[model_id].assign(map_file(checkpoint, names, dtypes))

    @individual
    def finish_loading(self, model_id: str) -> None:
        """All weights have been given. Raises what the host raises for those that it was given."""
        self._models[model_id].finish_loading()
        give_back_freed_memory()  # what reading took

    @individual
    def digest(self, model_id: str) -> str:
        """SHA-256 over all parameters, names in order: to see that no byte of them has changed."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._models[model_id].parameters().items()):
            digest.update(name.encode())
            digest.update(bytes_of_tensor(tensor).data)
        return digest.hexdigest()

    @individual
    def release(self, model_id: str) -> None:
        """Forget a model, if it is known."""
        model = self._models.pop(model_id, None)
        self._received.pop(model_id, None)
        if self._answers is not None:
            self._answers.clear()
        if model is not None:
            model.close()
        del model
        give_back_freed_memory()  # models refer to themselves in circles, and hold their shared pages until they are found
        self._device.give_back_memory()

    # ---- calls of a host

    @individual
    def call_host(self, model_id: str, method: str, arguments: Message) -> Message:
        """Call a method of a host. arguments: its positional ones and its named ones. Raises what it raises.

        What steps have received is let go of: such calls come before a run, after it, and where memory is wanted.
        """
        self._received.pop(model_id, None)
        self._result = pack(self._bound(model_id, method, arguments)(), self._store)
        return self._result

    @collective
    def call_host_together(
        self,
        model_id: str,
        method: str,
        arguments: Message,
        control: RankControl | None = None,
        from_all: bool = False,
        ranks: int | None = None,
    ) -> Message | None:
        """Call a method of a host that takes the group first. Returns rank 0's result, or each rank's. Raises what it raises.

        User errors are raised alike on every rank, before anything is exchanged, and leave the group whole; so does a cancel.
        ranks: how many of the first ranks are a group for this call, and are asked: 1, or of the config's `halves`; None: all.
        """
        group, watch = self._group_of(ranks), None if ranks == 1 else self._watch
        if control is not None:
            pace, rank = Pace(self._device), group.rank

            def at_block() -> None:
                pace.keep()
                control.at_block(rank)

            group = dataclasses.replace(group, at_block=at_block, at_end=functools.partial(control.at_end, rank))
        if watch is not None:
            watch.begin()
        try:
            received = self._received.setdefault(model_id, Received())
            result = self._bound(model_id, method, arguments, received)(group)
        except (UserError, StepCancelled):
            raise
        except Exception:
            self._received.pop(model_id, None)  # memory may have run out
            # The others may be waiting for this rank.
            if control is not None:
                control.abort()
            if watch is not None:
                watch.tell()
            if ranks != 1:
                self.leave(after_failure=True)
            raise
        finally:
            if watch is not None:
                watch.end()
        self._result = pack(result, self._answers) if from_all or group.rank == 0 else None
        return self._result

    def _group_of(self, ranks: int | None) -> SequenceParallelGroup:
        """That of all ranks, or of the first."""
        if ranks == 1:
            return SequenceParallelGroup.single()
        group = self._group
        assert group is not None, "no process group"
        if ranks is None or ranks == group.world_size:
            return group
        return group.first[ranks]

    def _bound(
        self, model_id: str, method: str, arguments: Message, received: Received | None = None
    ) -> Callable[..., object]:
        host = self._models[model_id]
        args, kwargs = unpack(arguments, host.module, received)
        return lambda *first: getattr(host, method)(*first, *args, **kwargs)


class _CollectingHandler(logging.Handler):
    """Keeps log records for the driver, which is where a user reads them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._records: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.levelno, record.getMessage()))

    def drain(self) -> list[tuple[int, str]]:
        records, self._records = self._records, []
        return records
