"""Ranks in processes of their own, without Ray: for measurements that want nothing else on a rank's processor."""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayltx.devices import CPU, kind_of
from rayltx.errors import UserError
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, device: str = CPU) -> list[Any]:
    """What `function(group, *arguments)` returns on each of so many new ranks, by rank: small things without tensors.

    function: of a module. Each rank has one thread; with a GPU each has its own. Raises what the first rank raised for the
    user to mend, and torch's ProcessRaisedException for the rest.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, folder, function, arguments, device), nprocs=ranks)
        found = [pickle.loads(_answer_file(folder, rank).read_bytes()) for rank in range(ranks)]
    for answer in found:
        if isinstance(answer, UserError):
            raise answer
    return found


def _answer_file(folder: str, rank: int) -> Path:
    """A file holds any answer; a queue, which is read when all have ended, what a pipe does."""
    return Path(folder) / f"answer {rank}"


def _rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: Any, device: str) -> None:
    torch.set_num_threads(1)
    kind = kind_of(device)
    if device != CPU:
        getattr(torch, device).set_device(rank)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group(kind.collectives, store=store, rank=rank, world_size=ranks)
    try:
        answer = function(SequenceParallelGroup.create(ParallelConfig(ranks)), *arguments)
    except UserError as error:
        answer = error  # alike on every rank
    _answer_file(folder, rank).write_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


def thread_seconds(work: Callable[[], object]) -> float:
    """Processor time of this thread, which computes: what threads of the exchange take is not in it."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def event_seconds(device: str, work: Callable[[], object]) -> float:
    """Between two events on this rank's GPU: with what it waits there for others."""
    module = getattr(torch, device)
    before, after = module.Event(enable_timing=True), module.Event(enable_timing=True)
    before.record()
    work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def slowest(seconds: float, device: str = CPU) -> float:
    """Of all ranks. Collective."""
    mine = torch.tensor(seconds, dtype=torch.float32 if device != CPU else torch.float64, device=device)
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    return float(mine)
