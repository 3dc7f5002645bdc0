"""What was found out about this machine's GPUs, remembered from one start to the next."""

from __future__ import annotations

from pathlib import Path

from rayltx.json_records import read_record, write_record

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
        record = {_WITHOUT_PEER_TO_PEER: sorted({*self._read(), self._gpus})}
        write_record(Path(self._path), record, "what was found about the GPUs", "it will be tried at each start")

    def _read(self) -> list[str]:
        listed = read_record(Path(self._path)).get(_WITHOUT_PEER_TO_PEER) if self._path else None
        return [gpus for gpus in listed if isinstance(gpus, str)] if isinstance(listed, list) else []
