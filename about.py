"""Facts about this installation."""

from pathlib import Path

VERSION = "0.1.0"  # as in pyproject.toml, which a registry reads and a ComfyUI folder does not

ROOT = Path(__file__).resolve().parent
IMPORTABLE = ROOT / "importable"  # the folder that makes `rayltx` importable from a search path
