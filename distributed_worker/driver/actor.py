"""What Ray runs: a worker, told what to do by bytes. Importing this imports nothing heavy, as the courier does."""

from __future__ import annotations

from rayltx.distributed_worker.driver.line import WorkerLine


class RayWorker:
    def __init__(self, device: str, num_threads: int, shared_folder: str, line: str = "") -> None:
        """shared_folder: of the process that asks, if it is on this machine, and maps what this one shares; else "".
        line: the short way to that process (see `driver.line`); "": there is none.
        """
        from rayltx.distributed_worker.worker import Worker

        self._worker = Worker(device, num_threads, shared_folder)
        self._line = WorkerLine.to(line)

    def run(self, payload: bytes, *kept: object) -> bytes:
        """Run a call of `messages.dump_call`. Returns a pickled Outcome."""
        return self._worker.answer(payload, kept)[0]

    def serve(self) -> bytes:
        """`run` what comes by the line, until called back. Returns nothing."""
        assert self._line is not None
        self._line.serve(lambda payload: self._worker.answer(payload, ())[0])
        return b""

    def run_and_keep(self, payload: bytes, *kept: object) -> tuple[bytes, object]:
        """The same, with the call's result apart, for Ray to keep in its store."""
        return self._worker.answer(payload, kept, keeps=True)
