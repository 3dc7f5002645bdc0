"""What to say when a package is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable


def not_found(modules: Iterable[str]) -> list[str]:
    """Those of `modules`, top-level names, that Python does not find. Imports none of them."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def pip_install(what: str) -> str:
    """The command line that installs `what`, quoted as a shell needs it, into this Python."""
    return f'"{sys.executable}" -m pip install {what}'
