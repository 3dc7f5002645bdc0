"""What to say when a package that the workers need is not installed: the nodes appear without it."""

from __future__ import annotations

from rayltx.about import ROOT
from rayltx.errors import MissingPackageError
from rayltx.missing_packages import not_found, pip_install

_MODULES = ("ray", "gguf", "safetensors", "numpy", "psutil")


def require_packages() -> None:
    """Raises MissingPackageError with the command that installs what is missing."""
    missing = not_found(_MODULES)
    if missing:
        requirements = ROOT / "requirements.txt"
        raise MissingPackageError(
            f"RayLTX needs {', '.join(missing)}, which ComfyUI's Python lacks. Install with:\n"
            + pip_install(f'-r "{requirements}"')
            + "\nand start ComfyUI again"
        )
