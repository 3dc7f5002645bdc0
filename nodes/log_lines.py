"""ComfyUI's log has messages alone, of all packs: those of this one say whose they are."""

from __future__ import annotations

import logging

_NAME = "RayLTX"


class _Naming(logging.Handler):
    """Writes nothing. A record comes to the handlers of its own loggers first, and then, as it is by then, to ComfyUI's."""

    def emit(self, record: logging.LogRecord) -> None:
        if not str(record.msg).startswith(_NAME):
            record.msg = f"{_NAME}: {record.msg}"


_NAMING = _Naming()


def name_log_lines() -> None:
    """Let messages begin with the pack's name from now on, in this process."""
    logging.getLogger("rayltx").addHandler(_NAMING)  # which is there once, however often this is called
