"""What was found out about this machine's GPUs, remembered from one start to the next."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rayltx.whole_files import appearing_whole

logger = logging.getLogger(__name__)

_WITHOUT_PEER_TO_PEER = "without peer-to-peer"


class MachineRecord:
    """A file of findings, by the GPUs that they are about. path: "" remembers nothing."""

    def __init__(self, path: str, gpus: tuple[str, ...]) -> None:
        """gpus: what those are called that work together; () for those of other machines, of which nothing is kept."""
        self._path, self._gpus = path, ", ".join(gpus)

    def needs_no_peer_to_peer(self) -> bool:
        """Whether these GPUs could not reach each other's memory."""
        return bool(self._gpus) and self._gpus in self._read()

    def remember_no_peer_to_peer(self) -> None:
        """Start these GPUs' workers without peer-to-peer copies from now on. Warns where that cannot be written down."""
        if not self._path or not self._gpus:
            return
        path = Path(self._path)
        found = sorted({*self._read(), self._gpus})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with appearing_whole(path) as temporary:
                temporary.write_text(json.dumps({_WITHOUT_PEER_TO_PEER: found}, indent=1))
        except OSError as error:
            logger.warning("what was found about the GPUs cannot be kept (%s): it will be tried at each start", error)

    def _read(self) -> list[str]:
        if not self._path:
            return []
        try:
            found = json.loads(Path(self._path).read_text())
        except (OSError, ValueError):  # none yet, or damaged: it is found out again
            return []
        listed = found.get(_WITHOUT_PEER_TO_PEER, []) if isinstance(found, dict) else []
        return [gpus for gpus in listed if isinstance(gpus, str)] if isinstance(listed, list) else []
