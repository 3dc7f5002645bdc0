"""The way from a model next to the transformer, such as a VAE, to the workers who have it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import comfy.model_management
import torch

from rayltx.comfy_dist.auxiliary_host import AuxiliaryHost
from rayltx.comfy_dist.main_process.loaded_models import FileState
from rayltx.comfy_dist.main_process.releasing import release_with, wait_for_releases
from rayltx.comfy_dist.main_process.worker_link import raise_if_cancelled
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.remote_model import RemoteModel
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.weight_sharing import Progress
from rayltx.distributed_worker.worker_calls import Call, ask
from rayltx.errors import OutOfMemory

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_Link = TypeVar("_Link", bound="AuxiliaryLink")


@dataclass
class Held:
    """What the workers hold of a model."""

    remote: RemoteModel

    def release(self) -> None:
        """Let the workers forget it. Nothing is waited for."""
        self.remote.release_unless_busy()


@dataclass
class KeptAuxiliary:
    """The model that a node had at its last run. It is the node's own, so it goes when ComfyUI forgets the node."""

    model: Any = None


class AuxiliaryLink:
    """Of one model. Copies of it have the same."""

    kind = "model"  # as messages name it

    def __init__(self, cluster: Cluster, remote: RemoteModel) -> None:
        self.cluster, self.held = cluster, Held(remote)

    def __deepcopy__(self, memo: object) -> AuxiliaryLink:
        return self

    @property
    def remote(self) -> RemoteModel:
        return self.held.remote

    def ensure_loaded(self) -> None:
        """Have it on the workers that run now: those that had it may have ended, or others may have taken their place.

        It follows the MODEL, so that a graph's two never end each other's workers. Starts workers if none run.
        """
        current = Cluster.current()
        running = current is not None and current.is_alive()
        cluster = current if current is not None and running else Cluster.start(self.cluster.request)
        if cluster is self.cluster and not self.remote.is_lost:
            return
        logger.warning("the Ray workers do not have this %s any more: loading it again", self.kind)
        self.held.release()
        with cluster.group.polling(raise_if_cancelled):
            self.cluster, self.held.remote = cluster, cluster.load_source(self.remote.source)
        self._loaded_again()

    def _loaded_again(self) -> None:
        """What was known of other workers is not known of these."""

    def _on_one(self, call: Call[Any, _Result], what: str) -> _Result:
        return next(iter(self._spread([call], what)))

    def _spread(self, calls: Iterable[Call[Any, _Result]], what: str) -> Generator[_Result, None, None]:
        yield from self.remote.spread(calls, what, raise_if_cancelled)

    def _rest(self) -> None:
        """What the workers gave is here: they keep what they shared until they are asked for something else."""
        self.remote.tell(ask(AuxiliaryHost.rest))


class LivingLinks:
    """The workers' models by what was loaded: the file, and the tensors of it.

    Each node has an object of its own on them, as in ComfyUI, where nodes set things on a VAE's model.
    """

    def __init__(self) -> None:
        self._links: weakref.WeakValueDictionary[tuple[FileState, tuple[str, ...]], Any] = weakref.WeakValueDictionary()

    def get(
        self, checkpoint: Checkpoint, request: ClusterRequest, load: Callable[[], _Link], kept: KeptAuxiliary | None
    ) -> _Link:
        """The link of what is loaded from a file, on workers that run; else what `load` gives, without what was kept."""
        source = FileState.of(checkpoint.path), tuple(checkpoint.tensors)
        link: _Link | None = self._links.get(source)
        if kept is not None:
            kept.model = None  # which may have been what kept the link
        if link is not None:
            Cluster.start(request)
            link.ensure_loaded()
            return link
        wait_for_releases()
        self._links[source] = link = load()
        release_with(link, link.held)
        return link


def load_on_workers(
    checkpoint: Checkpoint, spec: object, host: str, dtype: torch.dtype, request: ClusterRequest, name: str,
    progress: Progress | None,
) -> tuple[Cluster, RemoteModel]:  # fmt: skip
    """Load a model on the workers, which are started if they do not run. dtype: what its tensors become. name: for the log."""
    dtypes = {
        tensor: dtype
        for tensor, info in checkpoint.tensors.items()
        if info.dtype.is_floating_point and info.dtype != dtype
    }
    started = time.monotonic()
    cluster = Cluster.start(request)
    with cluster.group.polling(raise_if_cancelled):
        remote = cluster.load(checkpoint, spec, host, dtypes, progress, keeps_host_copy=True)
    logger.info(
        "%s, %s: %.2f GiB on %d workers in %.1f s", os.path.basename(checkpoint.path), name,
        remote.source.weight_bytes / 2**30, request.workers, time.monotonic() - started,
    )  # fmt: skip
    return cluster, remote


@contextlib.contextmanager
def as_comfyui_says_it(what: str) -> Iterator[None]:
    """Memory that runs out in a worker is to ComfyUI what its own is: it tries a VAE again by tiles."""
    try:
        yield
    except OutOfMemory as error:
        raise comfy.model_management.OOM_EXCEPTION(f"{what}: {error}") from error
