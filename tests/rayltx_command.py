"""The command, in a process of its own or in this one."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
_WIDE = {"COLUMNS": "200"}


def rayltx(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "importable"), **_WIDE}
    command = [sys.executable, "-m", "rayltx.cli.main", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def rayltx_here(*arguments):
    """The same in this process, for what starts nothing: one of its own imports torch for seconds."""
    from rayltx.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    package = logging.getLogger("rayltx")
    level = package.level
    with (
        mock.patch.object(sys, "argv", ["rayltx", *map(str, arguments)]),
        mock.patch.dict(os.environ, _WIDE),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            package.setLevel(level)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
