"""ComfyUI's log has messages alone, of all packs: those of this one say whose they are."""

from __future__ import annotations

import logging

_NAME = "RayLTX"


class _Naming(logging.Handler):
    """Writes nothing. A record comes to the handlers of its own loggers first, and then, as it is by then, to ComfyUI's."""

    def emit(self, record: logging.LogRecord) -> None:
        if not str(record.msg).startswith(_NAME):
            record.msg = f"{_NAME}: {record.msg}"


def name_log_lines() -> None:
    """Let messages begin with the pack's name from now on, in this process."""
    package = logging.getLogger("rayltx")
    if not any(isinstance(handler, _Naming) for handler in package.handlers):
        package.addHandler(_Naming())
