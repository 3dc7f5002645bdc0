"""What to say when a package that the workers need is not installed: the nodes appear without it."""

from __future__ import annotations

import logging

from rayltx.about import ROOT
from rayltx.comfy_dist.comfy_names import missing_names
from rayltx.errors import MissingPackageError
from rayltx.missing_packages import not_found, pip_install

logger = logging.getLogger(__name__)

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


def warn_of_missing_names() -> None:
    """Log what this ComfyUI does not have of what is used of it. The nodes appear all the same, and say it where it counts."""
    missing = missing_names()
    if missing:
        logger.error("RayLTX does not know this ComfyUI, which lacks or has otherwise: %s", ", ".join(missing))
