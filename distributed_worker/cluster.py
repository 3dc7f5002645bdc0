"""The workers of this process: started once, kept, mended when one fails."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil
import ray
import torch

from rayltx.about import IMPORTABLE
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.distributed_worker.calls import is_gone, values, wait_for_outcomes
from rayltx.distributed_worker.gpu_pinning import assign_gpus, visible_gpus, without_async_allocator
from rayltx.distributed_worker.messages import Message, Refer, SentTensors, pack, unpack
from rayltx.distributed_worker.object_store import fits_object_store, object_store_bytes
from rayltx.distributed_worker.worker import Worker, WorkerInfo
from rayltx.errors import ClusterError, DeviceError, ParallelConfigError, RanksFailedAlike
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_START_TIMEOUT_S = 300.0
_CHUNKS_AHEAD = 3  # read ahead of the workers; on GPUs also the most that the store holds


@dataclass(frozen=True)
class ClusterRequest:
    """What is asked of a cluster. Two equal requests are served by the same workers."""

    workers: int
    device: str = "cpu"  # or "cuda"
    address: str = "local"  # start Ray here, or join the cluster at this address
    namespace: str = "default"
    gpu_indices: tuple[int, ...] = ()
    object_store_bytes: int = 0  # 0: automatic
    map_files: bool = False  # let the workers map the checkpoint itself, without the object store
    dashboard: str = ""  # host:port of Ray's dashboard; "": none
    group_address: str = ""  # host:port where the ranks meet; "": a free port
    step_timeout_s: float = 1800.0
    host: str = "rayltx.diffusion_models.lightricks.diffusers_host:DiffusersHost"  # imported ahead of its use
    bootstrap: tuple[str, Any] | None = (
        None  # (dotted path, payload): what each worker calls before it imports the host
    )

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ParallelConfigError(f"workers={self.workers} must be at least 1")
        if self.device not in ("cpu", "cuda"):
            raise DeviceError(f'device="{self.device}" must be cpu or cuda')

    def gpus(self) -> tuple[str, ...]:
        """CUDA_VISIBLE_DEVICES of each worker started here; () on the CPU and in another machine's cluster.

        Raises DeviceError if there are not enough GPUs.
        """
        if self.device == "cpu" or self.address != "local":
            if self.gpu_indices:
                raise DeviceError(
                    "gpu_indices choose among this machine's GPUs: they need the device cuda and a local cluster"
                )
            return ()
        visible = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
        return assign_gpus(self.workers, self.gpu_indices, visible)


class Cluster:
    """Some workers, and the group that they form.

    `start` returns at once, while the workers come up; whatever needs them waits.
    """

    _current: Cluster | None = None  # a process has one connection to Ray, so it has one cluster

    def __init__(self, request: ClusterRequest) -> None:
        self.request = request
        self._gpus = request.gpus()
        self.store_bytes = object_store_bytes(request.object_store_bytes) if request.address == "local" else 0
        self._owns_ray = self._connect()
        self._actors = [self._start_actor(rank) for rank in range(request.workers)]
        self._preparing = [self._prepare(actor) for actor in self._actors]
        self._infos: list[WorkerInfo] | None = None
        self._config: ParallelConfig | None = None
        self._models: dict[str, RemoteModel] = {}
        self._numbers = itertools.count()
        self._broken = False
        self._lacking: set[int] = set()  # ranks that were replaced, and may not have the models yet
        self._abandoned: dict[int, ray.ObjectRef] = {}
        self._sent = SentTensors()

    @classmethod
    def start(cls, request: ClusterRequest) -> Cluster:
        """The running cluster if it serves this request, or a new one in its place.

        Raises DeviceError for devices that are not there, before anything is started or stopped.
        """
        current = cls._current
        if current is not None and current.request == request and current.is_alive():
            return current
        request.gpus()
        if request.address == "local":
            object_store_bytes(request.object_store_bytes)
        if current is not None:
            current.shutdown()
        cls._current = cls(request)
        return cls._current

    @classmethod
    def current(cls) -> Cluster | None:
        return cls._current

    def uses_gpu(self, index: int) -> bool:
        """Whether a worker runs on a GPU of this machine, by its number in this process."""
        visible = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
        return index < len(visible) and visible[index] in self._gpus

    def is_alive(self) -> bool:
        return Cluster._current is self and ray.is_initialized()

    def shutdown(self) -> None:
        """End the workers, and Ray if it was started here. May be called twice."""
        if Cluster._current is self:
            Cluster._current = None
        if not ray.is_initialized():
            return
        for model in list(self._models.values()):
            model.forget()
        self._sent.clear()
        for actor in self._actors:
            ray.kill(actor)
        if self._owns_ray:
            ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    # ---- starting

    def _connect(self) -> bool:
        """Connect to Ray. Returns whether this started it."""
        if ray.is_initialized():
            logger.info("using the Ray connection that this process already has")
            self.store_bytes = int(ray.cluster_resources().get("object_store_memory", 0))
            return False
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": self.request.namespace}
        if self.request.address == "local":
            host, _, port = self.request.dashboard.rpartition(":")
            dashboard = {"dashboard_host": host, "dashboard_port": int(port)} if host else {}
            ray.init(
                address="local",
                include_dashboard=bool(dashboard),
                **dashboard,
                num_cpus=max(psutil.cpu_count() or 1, self.request.workers),
                # Ray's own count of memory to give out leaves the store's size out, and refuses to start when little is left.
                # Nothing here is given out by it.
                _memory=psutil.virtual_memory().total,
                num_gpus=0,  # GPUs are given out here, by CUDA_VISIBLE_DEVICES of each worker
                object_store_memory=self.store_bytes,
                **quiet,
            )
        else:
            ray.init(address=self.request.address, **quiet)
            self.store_bytes = int(ray.cluster_resources().get("object_store_memory", 0))
        return True

    def _start_actor(self, rank: int) -> Any:
        environment = {
            name: without_async_allocator(os.environ[name]) for name in _ALLOCATOR_VARIABLES if name in os.environ
        }
        # The one folder that makes `rayltx` importable, and nothing else of this repository.
        search_path = [str(IMPORTABLE), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
        resources: dict[str, float] = {"num_cpus": 0}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[rank]
            environment["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"  # Ray versions differ for num_gpus=0
        elif self.request.device == "cuda":
            resources["num_gpus"] = 1  # another machine's cluster gives out its own GPUs
        threads = max(1, (psutil.cpu_count() or 1) // self.request.workers)
        actor_class = ray.remote(**resources, max_restarts=0, runtime_env={"env_vars": environment})(Worker)
        return actor_class.remote(self.request.device, threads)

    def _prepare(self, actor: Any) -> ray.ObjectRef:
        return actor.run.remote("prepare", self.request.host, self.request.bootstrap)

    def workers(self) -> list[WorkerInfo]:
        """Who the workers are. Waits for them to have started."""
        if self._infos is None:
            outcomes = wait_for_outcomes(dict(enumerate(self._preparing)), _START_TIMEOUT_S)
            self._infos = values(outcomes, len(self._actors), "starting the workers", _START_TIMEOUT_S)
        return self._infos

    # ---- the group

    def form_group(self, config: ParallelConfig) -> None:
        """Let the first `config.world_size` workers form the group. Does nothing if they have.

        Raises ParallelConfigError if there are not as many workers.
        """
        if config.world_size > len(self._actors):
            raise ParallelConfigError(
                f"ulysses_degree={config.ulysses_degree} x ring_degree={config.ring_degree} = {config.world_size}, but "
                f"there are {len(self._actors)} workers; start more, or lower a degree"
            )
        self._settle()
        if self._broken:
            self._config = config
            self._mend()
        elif config != self._config:
            self._join(config)

    def _join(self, config: ParallelConfig) -> None:
        self.workers()
        self._config = None
        # All at once: taking a group's communicators apart may wait for every rank of it.
        self._call(range(len(self._actors)), "leave", "leaving the group")
        address = self._call([0], "open_store", "forming the group", self.request.group_address)[0]
        ranks = list(range(config.world_size))
        timeout_s = self.request.step_timeout_s
        self._call_each(ranks, "join", [(rank, config, address, timeout_s) for rank in ranks], "forming the group")
        self._config = config

    def _call(
        self, ranks: Sequence[int], method: str, what: str, *args: Any, timeout_s: float = _START_TIMEOUT_S
    ) -> list[Any]:
        return self._call_each(ranks, method, [args] * len(ranks), what, timeout_s)

    def _call_each(
        self,
        ranks: Sequence[int],
        method: str,
        args: Sequence[tuple[Any, ...]],
        what: str,
        timeout_s: float = _START_TIMEOUT_S,
        poll: Callable[[], None] | None = None,
    ) -> list[Any]:
        """Call a method of some workers, each with its own arguments; what they return, in order."""
        references = {
            position: self._actors[rank].run.remote(method, *arguments)
            for position, (rank, arguments) in enumerate(zip(ranks, args))
        }
        try:
            outcomes = wait_for_outcomes(references, timeout_s, poll)
        except BaseException:
            # Interrupted: the workers go on with what they were given. What comes next waits for them.
            self._abandoned = references
            raise
        return self._values(outcomes, len(references), what, timeout_s)

    def _values(self, outcomes: Mapping[int, Any], num_ranks: int, what: str, timeout_s: float) -> list[Any]:
        try:
            return values(outcomes, num_ranks, what, timeout_s)
        except RanksFailedAlike:
            self._config = None  # all ranks have left the group
            raise
        except ClusterError:
            self._broken = True
            raise

    def _settle(self) -> None:
        """Wait for calls that were interrupted, so that no rank is in an older step than another."""
        if self._abandoned:
            references, self._abandoned = self._abandoned, {}
            outcomes = wait_for_outcomes(references, self.request.step_timeout_s)
            try:
                self._values(outcomes, len(references), "an interrupted step", self.request.step_timeout_s)
            except Exception as error:  # nobody waits for that step any more; a broken group is noted
                logger.warning("%s", error)

    def _mend(self) -> None:
        """Replace workers that died or do not answer, give the new ones the models, and form the group anew."""
        started = time.monotonic()
        config, self._config = self._config, None
        if self.request.device == "cuda":
            gone = list(range(len(self._actors)))  # a communicator in an unknown state can hang its process at any time
        else:
            pings = [actor.run.remote("leave") for actor in self._actors]
            gone = [rank for rank, ping in enumerate(pings) if is_gone(ping, timeout_s=5.0)]
        for rank in gone:
            ray.kill(self._actors[rank])
            self._actors[rank] = self._start_actor(rank)
            self._preparing[rank] = self._prepare(self._actors[rank])
        self._infos = None
        self._lacking.update(gone)
        self.workers()
        for model in list(self._models.values()):
            model.load_on(sorted(self._lacking))
        self._lacking.clear()
        self._broken = False
        if config is not None:
            self._join(config)
        replaced = f"replaced rank {', '.join(map(str, gone))}" if gone else "no worker was lost"
        logger.warning("the group was formed anew in %.1f s (%s)", time.monotonic() - started, replaced)

    def ensure_whole(self) -> None:
        """Wait for what was interrupted, and replace workers that are known to be gone."""
        self._settle()
        if self._broken:
            self._mend()

    # ---- models

    def load(
        self,
        checkpoint: Checkpoint,
        spec: Any,
        host: str = "",
        dtypes: Mapping[str, torch.dtype] | None = None,
        progress: Callable[[int, int], None] | None = None,
        keeps_host_copy: bool = False,
    ) -> RemoteModel:
        """Load a checkpoint on every worker, from one copy in this machine's memory.

        spec: what the host class takes, next to the device. dtypes: of tensors to convert; others are left as they are.
        progress: called with (bytes that all workers have, bytes in all).
        keeps_host_copy: whether the host keeps the shared weights when it has them on a GPU.
        """
        self.ensure_whole()
        self.workers()
        model = RemoteModel(
            self,
            f"model-{next(self._numbers)}",
            checkpoint,
            spec,
            host or self.request.host,
            dtypes or {},
            keeps_host_copy,
        )
        self._models[model.model_id] = model
        try:
            model.load_on(range(len(self._actors)), progress)
        except BaseException:
            model.release()
            raise
        return model

    def held_bytes(self) -> int:
        return sum(model.held_bytes for model in self._models.values())

    def memory(self) -> list[int]:
        """Each worker's share of physical memory in bytes (PSS)."""
        return self._call(range(len(self._actors)), "memory", "measuring memory")


_Answer = TypeVar("_Answer")


def _repeated(call: Callable[[], _Answer], what: str, repeats: int = 2) -> _Answer:
    """The answer of a call that mends the group first. After a failure of the group it is made again, at most so often."""
    for attempt in itertools.count():
        try:
            return call()
        except ClusterError as error:
            if isinstance(error, RanksFailedAlike) or attempt == repeats:
                raise
            logger.warning("%s; repeating %s", error, what)
    raise AssertionError("unreachable")


@dataclass
class RemoteModel:
    """A model that the workers hold."""

    cluster: Cluster
    model_id: str
    checkpoint: Checkpoint
    spec: Any
    host: str
    dtypes: Mapping[str, torch.dtype]  # of tensors that are converted when they are read
    keeps_host_copy: bool = False  # on the CPU, parameters are views on it in any case
    held_bytes: int = 0
    _chunks: list[ray.ObjectRef] = field(default_factory=list)
    _from_file: bool = False
    refer: Refer | None = None  # what the workers know by name, for objects inside of inputs
    _setups: dict[str, tuple[str, Any]] = field(default_factory=dict)  # by key, in the order in which they were made

    def load_again(self, cluster: Cluster) -> RemoteModel:
        """The same model on another cluster, in place of one that was ended. Setups are not repeated."""
        model = cluster.load(self.checkpoint, self.spec, self.host, self.dtypes, keeps_host_copy=self.keeps_host_copy)
        model.refer = self.refer
        return model

    def load_on(self, ranks: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Build the model on some workers and give them its weights."""
        cluster, what = self.cluster, f"loading {os.path.basename(self.checkpoint.path)}"
        if not ranks:
            return
        cluster._call(ranks, "build", what, self.model_id, self.host, self.spec)
        total = self.weight_bytes
        if not self._chunks and not self._from_file:
            self._from_file = cluster.request.map_files or not self._fits()
            if self._from_file and not cluster.request.map_files:
                logger.warning(
                    "the object store (%.2f GiB, %.2f GiB in use) cannot hold %.2f GiB of weights: the workers map the "
                    "file itself",
                    cluster.store_bytes / 2**30,
                    cluster.held_bytes() / 2**30,
                    total / 2**30,
                )
        if self._from_file:
            arguments = [(self.model_id, self.checkpoint, tuple(self.checkpoint.tensors), self.dtypes)] * len(ranks)
            cluster._call_each(ranks, "take_file", arguments, what)
        else:
            self._share_chunks(ranks, what, progress)
        cluster._call(ranks, "finish_loading", what, self.model_id)
        for method, argument in self._setups.values():
            cluster._call(ranks, "call", what, self.model_id, method, False, argument)
        if progress is not None:
            progress(total, total)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as the workers hold them."""
        return sum(
            info.num_elements * self.dtypes.get(name, info.dtype).itemsize
            for name, info in self.checkpoint.tensors.items()
        )

    @property
    def _stays_shared(self) -> bool:
        """Whether the object store holds the weights for as long as the model lives."""
        return self.cluster.request.device == "cpu" or self.keeps_host_copy

    def _fits(self) -> bool:
        if not self._stays_shared:
            largest = max(
                sum(self.checkpoint.tensors[name].num_bytes for name in names) for names in self.checkpoint.chunks
            )
            return fits_object_store(largest * (_CHUNKS_AHEAD + 1), self.cluster.store_bytes, self.cluster.held_bytes())
        return fits_object_store(self.weight_bytes, self.cluster.store_bytes, self.cluster.held_bytes())

    def _share_chunks(self, ranks: Sequence[int], what: str, progress: Callable[[int, int], None] | None) -> None:
        """Rank 0 reads the chunks into the object store, and the workers take them from there.

        Where the weights stay views on the chunks, the chunks are kept: for nothing, and a worker that has to be replaced
        finds them there. Otherwise a GPU's worker has copied a chunk when it answers, so it is let go, and the store never
        holds more than a few.
        """
        cluster, names = self.cluster, self.checkpoint.chunks
        if self._chunks:
            cluster._call_each(ranks, "take_chunks", [(self.model_id, *self._chunks)] * len(ranks), what)
            return
        sizes = [sum(self.checkpoint.tensors[name].num_bytes for name in part) for part in names]
        keep = self._stays_shared
        reading: list[ray.ObjectRef] = []
        for number in range(len(names)):
            ahead = names[number + len(reading) :] if keep else names[number + len(reading) : number + _CHUNKS_AHEAD]
            reading += [
                cluster._actors[0].run.remote("read_chunk", self.checkpoint, part, self.dtypes) for part in ahead
            ]
            chunk = reading.pop(0)
            if keep:
                ray.wait([chunk], fetch_local=False)
                self._chunks.append(chunk)
            else:
                cluster._call_each(ranks, "take_chunks", [(self.model_id, chunk)] * len(ranks), what)
            if progress is not None:
                progress(sum(sizes[: number + 1]), sum(sizes))
        if keep:
            cluster._call_each(ranks, "take_chunks", [(self.model_id, *self._chunks)] * len(ranks), what)
            self.held_bytes = self.weight_bytes

    def forward(
        self, inputs: Any, config: ParallelConfig, poll: Callable[[], None] | None = None, repeats: int = 2
    ) -> Any:
        """One call of the model by the ranks of a group.

        inputs: any object; tensors in it may be anywhere. poll: see `wait_for_outcomes`; raising in it cancels.
        A call that failed because a rank died, hung or failed alone is repeated, by a group that was mended, up to
        `repeats` times.
        """
        return _repeated(lambda: self._forward(inputs, config, poll), "the step", repeats)

    def _forward(self, inputs: Any, config: ParallelConfig, poll: Callable[[], None] | None) -> Any:
        cluster = self.cluster
        cluster.form_group(config)
        message: Message = pack(inputs, cluster._sent, self.refer)
        ranks = range(config.world_size)
        arguments = [(self.model_id, message)] * len(ranks)
        answers = cluster._call_each(ranks, "forward", arguments, "a step", cluster.request.step_timeout_s, poll)
        return unpack(answers[0])

    def setup(self, key: str, method: str, argument: Any, what: str) -> None:
        """Call a method of the host on every worker, and again on any that is replaced later.

        key: a later setup with the same key takes this one's place.
        """
        cluster = self.cluster

        def call() -> None:
            cluster.ensure_whole()
            cluster._call(range(len(cluster._actors)), "call", what, self.model_id, method, False, argument)

        _repeated(call, what)
        self._setups.pop(key, None)
        self._setups[key] = (method, argument)

    def forget_setups(self, prefix: str) -> None:
        for key in [key for key in self._setups if key.startswith(prefix)]:
            del self._setups[key]

    def call(self, method: str, *args: Any, what: str, ranks: Sequence[int] | None = None) -> list[Any]:
        """Call a method of the host on some workers, or on all; what they return, in order."""
        cluster = self.cluster
        wanted = range(len(cluster._actors)) if ranks is None else ranks

        def call() -> list[Any]:
            cluster.ensure_whole()
            return cluster._call(wanted, "call", what, self.model_id, method, False, *args)

        return _repeated(call, what)

    def tell(self, method: str, *args: Any) -> None:
        """Have all workers call a method of the host after what they are doing. Nothing is waited for, nor reported."""
        if self.cluster.is_alive():
            for actor in self.cluster._actors:
                actor.run.remote("call", self.model_id, method, False, *args)

    def call_collective(self, method: str, config: ParallelConfig, what: str) -> list[Any]:
        """Call a method of the host that takes the group, on all ranks of it."""
        self.cluster.form_group(config)
        return self.cluster._call(range(config.world_size), "call", what, self.model_id, method, True)

    def digest(self) -> list[str]:
        """SHA-256 of the parameters that each worker sees."""
        return self.cluster._call(range(len(self.cluster._actors)), "digest", "hashing", self.model_id)

    def release(self) -> None:
        """Let the workers forget the model. Its memory is free when they have."""
        if self.model_id in self.cluster._models and not self.cluster._broken:
            self.cluster._call(range(len(self.cluster._actors)), "release", "releasing a model", self.model_id)
        self.forget()

    def release_unless_busy(self) -> None:
        """Release from another thread. Nothing is waited for, and a cluster that is gone has nothing to release."""
        cluster = self.cluster
        if cluster.is_alive() and self.model_id in cluster._models:
            for actor in cluster._actors:
                actor.run.remote("release", self.model_id)
        self.forget()

    def forget(self) -> None:
        self.cluster._models.pop(self.model_id, None)
        self._chunks.clear()
        self.held_bytes = 0
