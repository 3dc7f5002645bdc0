"""Make a worker's ComfyUI that of the user: the same checkout, the same arguments, the same folders."""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayltx.distributed_worker.request import Bootstrap
from rayltx.errors import InputError

_PER_PROMPT = ("preview_method",)  # arguments that ComfyUI sets anew for each prompt


@dataclass(frozen=True)
class ComfyEnvironment:
    """What a process needs to know of a ComfyUI to be like it. Picklable; two equal ones make equal workers."""

    root: str
    arguments: dict[str, object] = field(default_factory=dict)  # of ComfyUI's command line
    version: str = ""  # that another machine's has to have; "": any
    # name: (paths, endings). Nodes add to them at any time, which is no reason to start other workers.
    folders: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict, compare=False)

    @classmethod
    def of_this_process(cls) -> ComfyEnvironment:
        """Capture the ComfyUI that runs here."""
        import folder_paths
        from comfy.cli_args import args

        folders = {
            name: (tuple(map(str, paths)), tuple(sorted(endings)))
            for name, (paths, endings) in folder_paths.folder_names_and_paths.items()
        }
        arguments = {name: value for name, value in vars(args).items() if name not in _PER_PROMPT}
        return cls(str(Path(folder_paths.__file__).resolve().parent), arguments, comfyui_version(), folders)

    @classmethod
    def headless(cls, root: str, cpu: bool) -> ComfyEnvironment:
        """A checkout with its default arguments, for use without its server."""
        return cls(root, {"cpu": cpu})

    def bootstrap(self) -> Bootstrap:
        """What lets a worker `enter` it before it imports anything of ComfyUI."""
        return Bootstrap(f"{__name__}:{enter.__name__}", self)


def enter(environment: ComfyEnvironment, device: str) -> None:
    """Become like a ComfyUI. Call before anything of ComfyUI is imported.

    device: "cpu" or "cuda", of this process. May be called again with the same root.
    Raises InputError where this machine has no ComfyUI there, or one of another version.
    """
    if not is_comfyui(environment.root):
        raise InputError(
            f"{socket.gethostname()}: there is no ComfyUI at {environment.root}. Every machine of a Ray cluster needs the same "
            "ComfyUI in the same folder"
        )
    if environment.root not in sys.path:
        # In front, as in ComfyUI itself: its modules have names such as `nodes` and `utils`.
        sys.path.insert(0, environment.root)
    if environment.version and comfyui_version() != environment.version:
        raise InputError(
            f"{socket.gethostname()}: the ComfyUI at {environment.root} is {comfyui_version()}, and yours is "
            f"{environment.version}. Every machine of a Ray cluster needs the same version"
        )
    import comfy.options  # noqa: F401  (argument parsing stays off: this process's arguments are not ComfyUI's)
    from comfy.cli_args import args

    for name, value in environment.arguments.items():
        setattr(args, name, value)
    args.cpu = device == "cpu"
    args.cuda_malloc = False  # a worker's allocator is torch's own, which ComfyUI's buffers depend on
    # Pinning pages of the object store is not known to work, and needs no trying: the copy to the GPU is once.
    args.disable_pinned_memory = True
    if environment.folders:
        folder_paths = importlib.import_module("folder_paths")
        for name, (paths, endings) in environment.folders.items():
            folder_paths.folder_names_and_paths[name] = (list(paths), set(endings))


def user_folder() -> Path:
    """Where what RayLTX remembers lies, in ComfyUI's user directory."""
    import folder_paths

    return Path(folder_paths.get_user_directory()) / "rayltx"


def comfyui_version() -> str:
    return importlib.import_module("comfyui_version").__version__


def is_comfyui(root: str | os.PathLike[str]) -> bool:
    return (Path(root) / "comfy" / "sd.py").is_file()


def check_comfyui(root: Path) -> None:
    """Raises InputError for a folder that is not a ComfyUI's."""
    if not is_comfyui(root):
        raise InputError(f"comfyui={root}: there is no ComfyUI in that folder (no comfy/sd.py)")


def enter_given(root: Path, environment: ComfyEnvironment, device: str, module: str = "comfy.options") -> Any:
    """As `enter`, for a ComfyUI that the command line names. Returns a module of it.

    Raises InputError where this Python cannot import it.
    """
    try:
        enter(environment, device)
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"comfyui={root}: cannot be imported by this Python ({error}); run rayltx with ComfyUI's own Python"
        ) from error


def version_of(root: Path) -> str | None:
    """By its files, for a Python that may not be its own. None without the one that says it; "" where that says it otherwise."""
    file = root / "comfyui_version.py"
    if not file.is_file():
        return None
    found = re.search(r"""__version__ = ["'](.+?)["']""", file.read_text())
    return found[1] if found else ""
