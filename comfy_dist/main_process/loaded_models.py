"""Checkpoints on their way to MODELs: loaded once, however often a node runs."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass

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

    root: TwinPatcher | None = None


class LoadedModels:
    """The twins' models that live, by what they were loaded from.

    A loader node runs again when any of its inputs changes, and ComfyUI has dropped its earlier output by then: the node
    itself keeps the model until it has the next one.
    """

    def __init__(self) -> None:
        # Each a MODEL without patches, of which all others are clones: in ComfyUI's list of loaded models it takes the place of
        # one that is gone, which would be reported as a leak otherwise, since its model lives.
        self._living: weakref.WeakValueDictionary[_Source, TwinPatcher] = weakref.WeakValueDictionary()

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
        root = self._living.get(source)
        if root is None:
            kept.root = None
            wait_for_releases()  # two models at once may be more than there is room for
            root = patcher_of(load_twin(path, placement, options, progress).model)
            self._living[source] = root
        kept.root = root
        return root.placed(placement)


loaded_models = LoadedModels()
