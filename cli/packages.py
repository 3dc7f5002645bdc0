"""What a subcommand says where a package that it needs is not installed.

A wheel brings the packages of `requirements.txt`, which suffice for the nodes. The command's own are its extra `cli`, and
torch is left to the machine. Each is imported where it is used, so a subcommand needs no other's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rayltx.about import ROOT, SEARCH_PATH
from rayltx.errors import MissingPackageError
from rayltx.missing_packages import not_found, pip_install

# By module: the package that holds it.
_PACKAGES = {name: name for name in ("typer", "rich", "diffusers", "imageio", "av")}
_PACKAGES |= {name: name for name in ("ray", "gguf", "safetensors", "numpy", "psutil", "torch")}
_PACKAGES["PIL"] = "pillow"
_OPTIONAL = {"matplotlib"}  # of no extra: they have other uses, and other versions, on most machines
_PACKAGES |= {name: name for name in _OPTIONAL}


def require_packages(modules: Iterable[str], who: str) -> None:
    """Raises MissingPackageError that names `who`, what of `modules` is missing, and how to install it."""
    missing = not_found(modules)
    if not missing:
        return
    remedies = []
    if optional := [_PACKAGES[name] for name in missing if name in _OPTIONAL]:
        remedies.append("Install with:\n" + pip_install(" ".join(optional)))
    if set(missing) - {"torch"} - _OPTIONAL:
        # A folder is installed as it stands; a wheel's name is known to pip.
        remedies.append("Install with:\n" + pip_install(f'-e "{ROOT}[cli]"' if SEARCH_PATH else '"rayltx[cli]"'))
    if "torch" in missing:
        remedies.append(
            "Which build of torch is right depends on the GPU: take the command from torch's own installation page. "
            "Without a GPU any will do:\n" + pip_install("torch")
        )
    names = ", ".join(_PACKAGES[name] for name in missing)
    raise MissingPackageError("\n".join([f"{who} needs {names}, which this Python lacks.", *remedies]))


@contextmanager
def missing_packages_named(who: str) -> Iterator[None]:
    """Turns the failed import of a package that `who` needs into MissingPackageError."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in _PACKAGES:
            require_packages(dict.fromkeys((module, "torch")), who)  # no subcommand does without torch
        raise
