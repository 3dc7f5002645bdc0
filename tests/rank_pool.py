"""A few processes that stay, and run functions as the ranks of a gloo group.

Starting a process costs seconds (importing torch), forming a group of running ones milliseconds.
"""

from __future__ import annotations

import datetime
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankPool:
    def __init__(self, num_ranks: int) -> None:
        context = mp.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory()
        self._groups = 0
        self._pipes, self._processes = [], []
        for _ in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world_size: int, function, *args, timeout_s: float = 120.0) -> list:
        """Call `function(*args)` on `world_size` ranks of a new group; its results by rank.

        The function must be importable. Raises AssertionError with the traceback of a rank that failed.
        """
        assert world_size <= len(self._pipes), f"{world_size} ranks of {len(self._pipes)}"
        self._groups += 1
        store = str(Path(self._directory.name) / f"store-{self._groups}")
        pipes = self._pipes[:world_size]
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, world_size, store, function, args))
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout_s), f"rank {rank} of {world_size} did not answer within {timeout_s} s"
            answers.append(pipe.recv())
        failed = [
            f"rank {rank} of {world_size} failed:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok
        ]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._directory.cleanup()


def _serve(pipe) -> None:
    torch.set_num_threads(1)
    while True:
        rank, world_size, store_path, function, args = pipe.recv()
        store = dist.FileStore(store_path, world_size)
        try:
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=60),
            )
            try:
                with torch.inference_mode():
                    answer = True, function(*args)
                # A rank that leaves closes connections that a slower one may still be making. They meet in the file,
                # not by dist.barrier, which one that has exchanged less than the others would not pass.
                store.set(f"done {rank}", "")
                store.wait([f"done {other}" for other in range(world_size)], datetime.timedelta(seconds=60))
            finally:
                store.set(f"done {rank}", "")  # one that failed does not wait: others may wait for it
                dist.destroy_process_group()
        except Exception:  # the process boundary
            answer = False, traceback.format_exc()
        pipe.send(answer)
