"""Checkpoints on their way to MODELs: loaded once, however often a node runs."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass

from rayltx.comfy_dist.comfy_types import BaseModel
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.releasing import wait_for_releases
from rayltx.comfy_dist.main_process.twin import LoadOptions, TwinPatcher, load_twin, patcher_of
from rayltx.distributed_worker.weight_sharing import Progress


@dataclass(frozen=True)
class FileState:
    """One state of one file: another file under the same name is another."""

    path: str
    modified_ns: int
    num_bytes: int

    @classmethod
    def of(cls, path: str) -> FileState:
        found = os.stat(path)
        return cls(os.path.realpath(path), found.st_mtime_ns, found.st_size)


_Source = tuple[FileState, LoadOptions]  # what was loaded


@dataclass
class Kept:
    """The model that a loader node had at its last run. It is the node's own, so it goes when ComfyUI forgets the node."""

    base_model: BaseModel = None


class LoadedModels:
    """The twins' models that live, by what they were loaded from.

    A loader node runs again when any of its inputs changes, and ComfyUI has dropped its earlier output by then: the node
    itself keeps the model until it has the next one.
    """

    def __init__(self) -> None:
        self._living: weakref.WeakValueDictionary[_Source, BaseModel] = weakref.WeakValueDictionary()

    def get(
        self,
        path: str,
        placement: Placement,
        options: LoadOptions,
        kept: Kept,
        progress: Progress | None = None,
    ) -> TwinPatcher:
        """A MODEL without patches on a checkpoint's weights, which are loaded if they are not. Raises as `load_twin`."""
        source = FileState.of(path), options
        base_model = self._living.get(source)
        if base_model is None:
            kept.base_model = None
            wait_for_releases()  # two models at once may be more than there is room for
            base_model = load_twin(path, placement, options, progress).model
            self._living[source] = base_model
        kept.base_model = base_model
        return patcher_of(base_model).placed(placement)


loaded_models = LoadedModels()
