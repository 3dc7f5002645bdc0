"""Checkpoints on their way to MODELs: loaded once, however often a node runs."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rayltx.comfy_dist.twin import LoadOptions, Placement, TwinPatcher, load_twin, patcher_of, wait_for_releases


@dataclass(frozen=True)
class _Source:
    """What was loaded: another file under the same name is another source."""

    path: str
    modified_ns: int
    num_bytes: int
    options: LoadOptions

    @classmethod
    def of(cls, path: str, options: LoadOptions) -> _Source:
        found = os.stat(path)
        return cls(os.path.realpath(path), found.st_mtime_ns, found.st_size, options)


class LoadedModels:
    """The twins' models that live, by what they were loaded from.

    A loader node runs again when any of its inputs changes, and ComfyUI has dropped its earlier output by then. So the
    last model is kept from one run to the next, until another is loaded or ComfyUI frees its memory.
    """

    def __init__(self) -> None:
        self._living: weakref.WeakValueDictionary[_Source, Any] = weakref.WeakValueDictionary()
        self._last: Any = None

    def get(
        self,
        path: str,
        placement: Placement,
        options: LoadOptions,
        progress: Callable[[int, int], None] | None = None,
    ) -> TwinPatcher:
        """A MODEL without patches on a checkpoint's weights, which are loaded if they are not. Raises as `load_twin`."""
        source = _Source.of(path, options)
        base_model = self._living.get(source)
        if base_model is not None:
            self._last = base_model
            return patcher_of(base_model).placed(placement)
        self.let_go()
        wait_for_releases()  # two models at once may be more than there is room for
        twin = load_twin(path, placement, options, progress)
        self._living[source] = self._last = twin.model
        return twin

    def let_go(self) -> None:
        """Keep no model that nobody else holds."""
        self._last = None


loaded_models = LoadedModels()
