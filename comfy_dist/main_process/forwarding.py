"""What a MODEL carries besides weights, on its way to the workers."""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import cloudpickle
from torch import Tensor, nn

from rayltx.comfy_dist.comfy_types import Model, Options
from rayltx.comfy_dist.wire import PatchState
from rayltx.distributed_worker.messages import Refer, pack
from rayltx.errors import UnsupportedError

# Of the transformer options: what runs in ComfyUI's process, around the call; what changes with every step; and what
# patches the model's inside.
_HERE = ("wrappers", "callbacks")
CHANGING = ("sigmas", "sample_sigmas", "cond_or_uncond", "uuids", "prefetch_dynamic_vbars")
OPTION_PATCHES = ("patches", "patches_replace", "optimized_attention_override")
MODEL_PREFIX = "diffusion_model."  # of object patches that belong into the workers
_INSTALLED = frozenset(("site-packages", "dist-packages"))
_BOTH = ("manual_cast_dtype",)  # object patches that count on both sides


def patch_state_of(patcher: Model) -> PatchState:
    """What a patcher of this process would do to the weights and the modules."""
    return PatchState(
        patches_uuid=patcher.patches_uuid,
        patches=dict(patcher.patches),
        object_patches={name: patch for name, patch in patcher.object_patches.items() if is_remote(name)},
        weight_wrapper_patches={
            key: list(found) for key, found in getattr(patcher, "weight_wrapper_patches", {}).items()
        },
        injections={key: list(found) for key, found in patcher.injections.items()},
        force_cast_weights=bool(getattr(patcher, "force_cast_weights", False)),
    )


def is_same_state(state: PatchState, sent: PatchState) -> bool:
    """Whether the workers would have to be told nothing new. ComfyUI's uuid covers only the weights' patches.

    Objects are compared by identity, which counts only while both are alive: keep the state that was sent.
    """
    if (state.patches_uuid, state.force_cast_weights) != (sent.patches_uuid, sent.force_cast_weights):
        return False
    pairs: tuple[tuple[Mapping[str, object], Mapping[str, object]], ...] = (
        (state.object_patches, sent.object_patches),
        (state.weight_wrapper_patches, sent.weight_wrapper_patches),
        (state.injections, sent.injections),
    )
    return all(
        mine.keys() == theirs.keys() and all(_is_same(mine[k], theirs[k]) for k in mine) for mine, theirs in pairs
    )


def _is_same(mine: object, theirs: object) -> bool:
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs))
    return mine is theirs


def remote_options(options: Options) -> Options:
    """The transformer options that the workers need, without those that change with every step.

    The model reads plain values. Objects are read by patches alone: without a patch of the model's inside, they belong to
    wrappers, which stay here with all that they have cached.
    """
    patched = any(options.get(name) for name in OPTION_PATCHES)
    kept = {name: value for name, value in options.items() if name not in _HERE and name not in CHANGING}
    return {name: value for name, value in kept.items() if patched or name in OPTION_PATCHES or _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes, Tensor))


def is_remote(name: str) -> bool:
    return name.startswith(MODEL_PREFIX) or name in _BOTH


def is_local(name: str) -> bool:
    return not name.startswith(MODEL_PREFIX)


def module_names(diffusion_model: nn.Module) -> Refer:
    """Lets closures over the model's modules cross: a worker puts its own module of that name in their place."""
    names = {id(module): name for name, module in diffusion_model.named_modules()}

    def refer(obj: object) -> str | None:
        return names.get(id(obj)) if isinstance(obj, nn.Module) else None

    return refer


def register_unimportable_modules() -> None:
    """Send classes and functions of custom nodes by value.

    ComfyUI loads nodes under names made of their paths, and nodes change the search path as they like: what does not
    come from an installed package, from ComfyUI itself or from here, another process may not be able to import.
    """
    import folder_paths

    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or name == "__main__" or name.split(".")[0] == "rayltx":
            continue
        if not _is_importable(name, file, folder_paths.__file__):
            cloudpickle.register_pickle_by_value(module)


def is_sent_whole(value: Any) -> bool:
    """Whether a function or class crosses with its code, as what a worker cannot import by name does."""
    import folder_paths

    name = value.__module__ or ""
    file = getattr(sys.modules.get(name), "__file__", None)
    if "<" in value.__qualname__ or (name and name not in sys.modules):
        return True
    if name.split(".")[0] == "rayltx":
        return False
    return name == "__main__" or (isinstance(file, str) and not _is_importable(name, file, folder_paths.__file__))


@functools.cache  # there are thousands of modules, and this is asked before every sampling
def _is_importable(name: str, file: str, folder_paths_file: str) -> bool:
    """Whether a worker can import a module of this process by its name."""
    if "/" in name or "\\" in name:
        return False
    if not _INSTALLED.isdisjoint(Path(file).parts):
        return True  # also a user's own, and a system's that a virtual environment sees
    parents = Path(file).resolve().parents
    comfyui = Path(folder_paths_file).resolve().parent
    if comfyui in parents:
        return comfyui / "custom_nodes" not in parents
    return any(Path(path).resolve() in parents for path in sysconfig.get_paths().values())


def check_sendable(items: Mapping[str, object], what: str, refer: Refer | None) -> None:
    """Raises UnsupportedError that names the one item which cannot cross to another process."""
    for name, item in items.items():
        try:
            pack(item, refer=refer)
        except Exception as error:  # pickling raises anything
            raise UnsupportedError(
                f"{what} {name!r} ({type(item).__name__}) cannot be sent to the workers: {error}. Remove the node that adds "
                "it, or use ComfyUI's own loader and one GPU for this workflow"
            ) from error
