"""One rank: a process with a device, a place in the process group, and the models that it runs."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import logging
import os
import socket
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray.util
import torch
import torch.distributed as dist

from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.distributed_worker.freed_memory import give_back_freed_memory
from rayltx.distributed_worker.host import Host
from rayltx.distributed_worker.messages import Message, bytes_of_tensor, pack, unpack
from rayltx.distributed_worker.weights import WeightChunk, map_file
from rayltx.errors import UserError
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig


@dataclass(frozen=True)
class Failure:
    """An exception as it crosses to the driver: itself where it can be pickled, its text in any case."""

    error: Exception | None
    kind: str
    text: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        try:
            pack(error)
            carried: Exception | None = error
        except Exception:  # whatever pickling raises: the text is carried instead
            carried = None
        return cls(carried, type(error).__name__, str(error), traceback.format_exc())


@dataclass(frozen=True)
class Outcome:
    """What a call on a worker gave."""

    value: Any = None
    failure: Failure | None = None
    logs: list[tuple[int, str]] = field(default_factory=list)  # (level, message)


@dataclass(frozen=True)
class WorkerInfo:
    pid: int
    hostname: str
    device: str
    device_memory_bytes: int


def import_dotted(path: str) -> Any:
    """The object that "package.module:name" names."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


class Worker:
    """Runs in a Ray actor. The driver calls `run` with the name of one of the other methods."""

    def __init__(self, device: str, num_threads: int) -> None:
        self._device = device
        self._models: dict[str, Host] = {}
        self._group: SequenceParallelGroup | None = None
        self._store: Any = None
        self._logs = _CollectingHandler()
        package_logger = logging.getLogger("rayltx")
        package_logger.addHandler(self._logs)
        package_logger.setLevel(logging.INFO)
        torch.set_num_threads(num_threads)  # Ray sets OMP_NUM_THREADS=1

    def run(self, method: str, *args: Any) -> Outcome:
        """Call a method. What it raises is returned, so that Ray has nothing to wrap."""
        try:
            return Outcome(value=getattr(self, method)(*args), logs=self._logs.drain())
        except Exception as error:  # the process boundary
            return Outcome(failure=Failure.of(error), logs=self._logs.drain())

    # ---- the process

    def prepare(self, host_path: str, bootstrap: tuple[str, Any] | None) -> WorkerInfo:
        """Import a host ahead of its use, and say who this is.

        bootstrap: (dotted path, payload) of a function to call before: `function(payload, device)`.
        """
        if bootstrap is not None:
            import_dotted(bootstrap[0])(bootstrap[1], self._device)
        import_dotted(host_path)
        memory = psutil.virtual_memory().total
        if self._device == "cuda":
            memory = torch.cuda.get_device_properties(0).total_memory
        return WorkerInfo(os.getpid(), socket.gethostname(), self._device, memory)

    def memory(self) -> int:
        """This process's share of physical memory in bytes: PSS, which counts a shared page once among its users."""
        return psutil.Process().memory_full_info().pss

    # ---- the group

    def open_store(self, address: str) -> tuple[str, int]:
        """Rank 0 offers the group a meeting point, at an address (host:port), or on a port that is free. Returns it."""
        host, _, port = address.rpartition(":")
        host = host or ray.util.get_node_ip_address()
        self._store = None  # the port of an earlier group is free again
        self._store = dist.TCPStore(host, int(port or 0), is_master=True, wait_for_workers=False)
        return host, self._store.port

    def join(self, rank: int, config: ParallelConfig, address: tuple[str, int], timeout_s: float) -> None:
        """Form a process group with the other ranks, in place of an earlier one. Collective."""
        self.leave()
        if config.world_size == 1:
            self._group = SequenceParallelGroup.single()
            return
        timeout = datetime.timedelta(seconds=timeout_s)
        store = self._store if rank == 0 else dist.TCPStore(*address, is_master=False, timeout=timeout)
        dist.init_process_group(
            "nccl" if self._device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=config.world_size,
            timeout=timeout,
        )
        self._group = SequenceParallelGroup.create(config)

    def leave(self) -> None:
        self._group = None
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---- models

    def build(self, model_id: str, host_path: str, spec: Any) -> None:
        """Make a host without weights."""
        self._models[model_id] = import_dotted(host_path)(spec, self._device)

    def read_chunk(
        self, checkpoint: Checkpoint, names: Sequence[str], dtypes: Mapping[str, torch.dtype]
    ) -> WeightChunk:
        return WeightChunk.read(checkpoint, names, dtypes)

    def take_chunks(self, model_id: str, *chunks: Outcome) -> None:
        """Assign what a worker read. Ray hands in the objects behind the references, mapped."""
        for read in chunks:
            if read.failure is not None:
                raise read.failure.error or RuntimeError(f"{read.failure.kind}: {read.failure.text}")
            self._models[model_id].assign(read.value.map())

    def take_file(
        self, model_id: str, checkpoint: Checkpoint, names: Sequence[str], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self._models[model_id].assign(map_file(checkpoint, names, dtypes))

    def finish_loading(self, model_id: str) -> None:
        self._models[model_id].finish_loading()
        give_back_freed_memory()  # what reading took

    def release(self, model_id: str) -> None:
        model = self._models.pop(model_id, None)
        close = getattr(model, "close", None)
        if close is not None:
            close()
        del model, close
        give_back_freed_memory()  # models refer to themselves in circles, and hold their shared pages until they are found
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def forward(self, model_id: str, message: Message) -> Message | None:
        """One step. Collective. The answer on rank 0."""
        assert self._group is not None, "no process group"
        try:
            answer = self._models[model_id].forward(self._group, unpack(message))
        except UserError:
            raise  # raised alike on every rank, before anything was exchanged
        except Exception:
            # The others may be waiting for this rank. With gloo they notice at once that it has left.
            if self._device == "cpu":
                self.leave()
            raise
        return None if answer is None else pack(answer)

    def call(self, model_id: str, method: str, collective: bool, *args: Any) -> Any:
        """Call another method of a host. collective: it takes the group first, and all of its ranks call it."""
        group = (self._group,) if collective else ()
        return getattr(self._models[model_id], method)(*group, *args)

    def digest(self, model_id: str) -> str:
        """SHA-256 over all parameters, names in order: to see that no byte of them has changed."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._models[model_id].parameters().items()):
            digest.update(name.encode())
            digest.update(bytes_of_tensor(tensor).data)
        return digest.hexdigest()


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
