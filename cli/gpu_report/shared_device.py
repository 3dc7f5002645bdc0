"""The exchange with the device's own numbers, several ranks on one device: collectives are staged through the host."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rayltx.devices import DeviceKind
from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE, relative_error
from rayltx.distributed_worker.machine_facts import Fact
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.local_attention import torch_attention
from rayltx.sequence_parallel.partition import ParallelConfig, TokenPartition
from rayltx.sequence_parallel.self_attention import SelfAttentionExchange
from rayltx.sequence_parallel.sharded_keys import ALL_GATHER, attention_over_sharded_keys
from rayltx.sequence_parallel.ulysses import gather_tokens

_LIMIT_S = 120.0
_CONFIGS = (ParallelConfig(2, 1), ParallelConfig(3, 1), ParallelConfig(1, 2))
_SHAPES = ((997, 8, 128), (7, 5, 64), (515, 7, 64))  # tokens, heads, head width
# Against the kernel of the whole, which rounds too.
_ALLOWED = {torch.float32: 10 * TOLERANCE, torch.bfloat16: 2e-2}


def exchange_on_one_device(kind: DeviceKind) -> Iterator[Fact]:
    """Self-attention, and few queries over the keys of all, in each way of sharing them."""
    for config in _CONFIGS:
        errors = _errors(kind, config)
        name = f"exchange, {config.ulysses_degree} x {config.ring_degree}"
        if isinstance(errors, str):
            yield Fact(name, "failed", errors)
            continue
        wrong = {dtype: error for dtype, error in errors.items() if not error <= _ALLOWED[dtype]}
        value = ", ".join(f"{str(dtype).removeprefix('torch.')} {error:.1e}" for dtype, error in errors.items())
        yield Fact(name, f"error {value}", "several GPUs would give another picture: report this" if wrong else "")


def _errors(kind: DeviceKind, config: ParallelConfig) -> dict[torch.dtype, float] | str:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    answers = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(rank, config, kind.name, port, answers), daemon=True)
        for rank in range(config.world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_LIMIT_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    if any(codes) or None in codes:
        return f"its ranks ended with {codes}"
    return answers.get()


def _rank(rank: int, config: ParallelConfig, device: str, port: int, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    dist.init_process_group("gloo", rank=rank, world_size=config.world_size)
    with staged():
        group = SequenceParallelGroup.create(config)
        errors = {dtype: max(max(_compared(group, *shape, dtype, device)) for shape in _SHAPES) for dtype in _ALLOWED}
    if rank == 0:
        answers.put(errors)
    dist.barrier()
    dist.destroy_process_group()


def _compared(
    group: SequenceParallelGroup, tokens: int, heads: int, width: int, dtype: torch.dtype, device: str
) -> tuple[float, float]:
    """(error of self-attention, error of few queries over all keys), which count on rank 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, heads, width, generator=generator).to(device, dtype) for _ in range(3))
    partition = TokenPartition.of(tokens, group.config)
    local = partition.local(group.rank)
    exchange = SelfAttentionExchange(group, partition, heads)
    value, query, key = (exchange.send(x[:, local].contiguous()) for x in (v, q, k))
    out = exchange.attend(query, key, value, torch_attention)
    whole = gather_tokens(out, partition.tokens, group.world)
    few = attention_over_sharded_keys(q[:, :5], k[:, local], v[:, local], group)
    few_error = relative_error(few, torch_attention(q[:, :5], k, v))
    return 0.0 if whole is None else relative_error(whole, torch_attention(q, k, v)), few_error


class _Done:
    def wait(self) -> bool:
        return True


@contextlib.contextmanager
def staged() -> Iterator[None]:
    """Let gloo carry tensors of any device, through the host."""
    all_to_all, passed_on = dist.all_to_all_single, dist.batch_isend_irecv
    all_gather = getattr(dist, ALL_GATHER)

    def staged_all_to_all(
        out: Tensor, sent: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None,
        group: Any = None, async_op: bool = False,
    ) -> _Done:  # fmt: skip
        received = torch.empty(out.shape, dtype=out.dtype)
        all_to_all(received, sent.cpu(), output_split_sizes, input_split_sizes, group=group)
        out.copy_(received)
        return _Done()

    def staged_all_gather(out: Tensor, sent: Tensor, group: Any = None) -> None:
        received = torch.empty(out.shape, dtype=out.dtype)
        all_gather(received, sent.cpu(), group=group)
        out.copy_(received)

    def staged_batch(operations: list[dist.P2POp]) -> list[_Done]:
        on_host = [
            dist.P2POp(operation.op, operation.tensor.cpu(), group=operation.group, group_peer=operation.group_peer)
            for operation in operations
        ]
        for work in passed_on(on_host):
            work.wait()
        for operation, staged_operation in zip(operations, on_host):
            if operation.op is dist.irecv:
                operation.tensor.copy_(staged_operation.tensor)
        return [_Done()]

    with (
        mock.patch.object(dist, "all_to_all_single", staged_all_to_all),
        mock.patch.object(dist, ALL_GATHER, staged_all_gather),
        mock.patch.object(dist, "batch_isend_irecv", staged_batch),
    ):
        yield
