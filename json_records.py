"""What is remembered in a JSON file from one start to the next: nothing is lost with it but the time to find it out again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rayltx.whole_files import appearing_whole

logger = logging.getLogger(__name__)


def read_record(path: Path) -> dict[str, Any]:
    """What the file holds; {} where there is none, or a damaged one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_record(path: Path, record: dict[str, Any], what: str, otherwise: str) -> None:
    """Write the file whole. Where that cannot be, warns that `what` cannot be kept, and what happens `otherwise`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing_whole(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1))
    except OSError as error:
        logger.warning("%s cannot be kept (%s): %s", what, error, otherwise)
