"""The command, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def rayltx(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "importable"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "rayltx.cli.main", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)
