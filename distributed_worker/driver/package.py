"""This package, to be sent to machines that do not have it."""

from __future__ import annotations

import shutil
from pathlib import Path

from rayltx.about import ROOT

_NOT_SENT = ("tests", "scripts", "importable", "build")


def copy_package(folder: Path) -> Path:
    """The Python files of this package, in a folder named `rayltx` within another, which Ray sends to other machines."""
    target = folder / "package" / "rayltx"
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).parts
        if parts[0] in _NOT_SENT or any(part.startswith(".") for part in parts):
            continue
        if len(parts) > 1 and not (ROOT / parts[0] / "__init__.py").is_file():
            continue
        (target / Path(*parts)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target / Path(*parts))
    return target
