"""Facts about this installation."""

import os
from pathlib import Path

VERSION = "0.1.0"  # as in pyproject.toml, which a registry reads and a ComfyUI folder does not

ROOT = Path(__file__).resolve().parent

# The folders that another process has to search to import `rayltx`. None where a wheel put it beside all other packages.
_IMPORTABLE = ROOT / "importable"
SEARCH_PATH = (str(_IMPORTABLE),) if _IMPORTABLE.is_dir() else ()


def python_path() -> str:
    """PYTHONPATH for another process: this one's, behind the folder that makes `rayltx` importable.

    Nothing else of this repository is found by it.
    """
    return os.pathsep.join(filter(None, [*SEARCH_PATH, os.environ.get("PYTHONPATH", "")]))
