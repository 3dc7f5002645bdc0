"""What to say when a package that the workers need is not installed: the nodes appear without it."""

from __future__ import annotations

import importlib.util
import sys

from rayltx.about import ROOT
from rayltx.errors import MissingPackageError

_MODULES = ("ray", "gguf", "safetensors", "numpy", "psutil")


def require_packages() -> None:
    """Raises MissingPackageError with the command that installs what is missing."""
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"RayLTX needs {', '.join(missing)}, which ComfyUI's Python lacks. Install with:\n"
            f'"{sys.executable}" -m pip install -r "{ROOT / "requirements.txt"}"\nand start ComfyUI again'
        )
