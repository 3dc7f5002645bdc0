"""What is tried on one device, check by check. Each runs in a process of its own, which it may take down.

A check returns facts; what is wrong is in a fact's `problem`. On a CPU a check does what a CPU can do, and says what it left.
"""

from __future__ import annotations

import datetime
import mmap
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayltx.devices import CPU, DeviceKind, is_out_of_memory
from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE, relative_error
from rayltx.distributed_worker.failure_watch import abort_group
from rayltx.distributed_worker.machine_facts import Fact
from rayltx.distributed_worker.shared_pages import protected_views, register_pages_of
from rayltx.sequence_parallel.local_attention import attention_with_lse, plain_attention
from rayltx.sequence_parallel.softmax_merge import SoftmaxAccumulator

_MIB, _GIB = 2**20, 2**30
_FORWARDS = 10
_PAGES_BYTES = 512 * _MIB
_ALLOWED = {torch.float32: TOLERANCE, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of attention, against float64
_NOTHING = "needs a GPU"


def attention_kernels(kind: DeviceKind) -> Iterator[Fact]:
    """Attention with its log-sum-exp by every kernel, in the widths and layouts of the exchange, odd sizes, and masks."""
    for dtype, allowed in _ALLOWED.items():
        worst, worst_lse, at = 0.0, 0.0, ""
        for width in (64, 128, 24, 12):
            for batch, queries, keys, heads, mask_kind in (
                (1, 130, 77, 5, "none"),
                (2, 33, 1099, 3, "none"),
                (1, 1, 1, 1, "none"),
                (1, 515, 515, 4, "row"),
                (2, 67, 131, 2, "blind rows"),
            ):
                error, lse_error = _attention_errors(kind.name, dtype, width, batch, queries, keys, heads, mask_kind)
                if error > worst:
                    worst, at = error, f"{queries} x {keys}, {heads} heads of {width}, mask: {mask_kind}"
                worst_lse = max(worst_lse, lse_error)
        wrong = worst > allowed or worst_lse > (2e-5 if dtype == torch.float32 else 5e-2)
        yield Fact(
            f"attention in {_short(dtype)}",
            f"error {worst:.1e} ({at}), of the log-sum-exp {worst_lse:.1e}",
            f"more than {allowed:.1e}: the ring would give a wrong picture; use ring_degree 1" if wrong else "",
        )


def _attention_errors(
    device: str, dtype: torch.dtype, width: int, batch: int, queries: int, keys: int, heads: int, mask_kind: str
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(1)

    def received(tokens: int) -> Tensor:  # as it comes out of an exchange: tokens before batch
        return torch.randn(tokens, batch, heads, width, generator=generator).to(device, dtype).transpose(0, 1)

    q, k, v = received(queries), received(keys), received(keys)
    mask = None
    if mask_kind == "row":
        mask = torch.linspace(-3, 0, keys)[None, None, None].to(device, dtype)
    if mask_kind == "blind rows":
        mask = torch.zeros(1, 1, queries, keys)
        mask[:, :, 3] = -torch.inf
        mask[:, :, :, 5:] -= 1.0
        mask = mask.to(device)
    out, lse = attention_with_lse(q, k, v, mask)
    wide = [x.double().transpose(1, 2) for x in (q, k, v)]
    right, right_lse = plain_attention(wide[0], wide[1], wide[2], None if mask is None else mask.double())
    seen = torch.isfinite(right_lse)
    right = right.masked_fill(~seen.unsqueeze(-1), 0.0)
    if not torch.isfinite(out).all() or bool((lse[~seen] != -torch.inf).any()):
        return float("inf"), float("inf")
    return relative_error(out.transpose(1, 2), right), float((lse.double() - right_lse)[seen].abs().max())


def float32_products(kind: DeviceKind) -> Iterator[Fact]:
    """Whether a part of the tokens gives what the whole does, which the self-test's tolerance needs."""
    yield Fact("TF32 for products", str(torch.backends.cuda.matmul.allow_tf32))
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    x, weight = torch.randn(4500, 4096), torch.randn(4096, 4096) / 64
    x, weight = x.to(kind.name), weight.to(kind.name)
    for rows in (2250, 23):
        error = relative_error(x[:rows] @ weight, (x[: 2 * rows] @ weight)[:rows])
        problem = "" if error <= TOLERANCE else f"more than {TOLERANCE:.0e}: the self-test would refuse every model"
        yield Fact(f"{rows} of {2 * rows} rows in float32", f"differ by {error:.1e}", problem)


def collectives_alone(kind: DeviceKind) -> Iterator[Fact]:
    """The collectives' library with one rank: what it takes of the memory, buffers that are dropped, groups formed anew."""
    torch.empty(1, device=kind.name)
    before, taken = kind.free_bytes(), 0
    for attempt in range(5):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group(kind.collectives, store=store, rank=0, world_size=1, timeout=limit)
        under_way = []
        for number in range(20):
            sent = torch.full((_MIB,), float(number % 7), device=kind.name, dtype=torch.bfloat16)
            received = torch.empty_like(sent)
            work = dist.all_to_all_single(received, sent, [_MIB], [_MIB], async_op=True)
            del sent
            under_way.append((work, received, number % 7))
            torch.full((_MIB,), 99.0, device=kind.name, dtype=torch.bfloat16)  # may get the memory of what was dropped
        for work, received, number in under_way:
            work.wait()
            if not bool((received == number).all()):
                yield Fact("collectives", "a buffer was overwritten while it was sent", "report this")
                return
        nothing = torch.empty(0, device=kind.name)
        dist.all_to_all_single(nothing.clone(), nothing, [0], [0])
        taken = before - kind.free_bytes()
        if attempt == 4 and kind.name != CPU:
            abort_group()
        else:
            dist.destroy_process_group()
    kind.give_back_memory()
    yield Fact("collectives", f"{kind.collectives}, formed 5 times, {taken / _MIB:.0f} MiB with one rank")


def host_pages(kind: DeviceKind) -> Iterator[Fact]:
    """Shared pages, protected, as the source of copies: whether the driver takes them, how fast, and next to computing."""
    store = np.frombuffer(mmap.mmap(-1, _PAGES_BYTES), np.uint8)
    store[:] = 3
    source = torch.from_numpy(protected_views({"weights": store})["weights"])
    if not kind.copies_by_itself():
        yield Fact("shared pages", f"protected; {_NOTHING} to copy from them")
        return
    target = torch.empty(_PAGES_BYTES, dtype=torch.uint8, device=kind.name)
    before = _copy_rate(kind, source, target)
    taken = register_pages_of(source, kind)
    after = _copy_rate(kind, source, target)
    right = bool((target == 3).all())
    yield Fact(
        "shared pages",
        f"{before / 1e9:.1f} GB/s as they are, {after / 1e9:.1f} GB/s "
        + ("registered" if taken else "(not registered)"),
        "" if right else "other bytes arrived than were sent: report this",
    )
    if not taken:
        yield Fact("registering", "refused by the driver: weights stream through two buffers")
    matrix = torch.randn(4096, 4096, device=kind.name, dtype=torch.bfloat16)
    side = kind.new_stream()

    def products() -> None:
        for _ in range(20):
            matrix @ matrix

    def both() -> None:
        with kind.in_stream(side):
            target.copy_(source, non_blocking=True)
        products()
        kind.current_stream().wait_stream(side)

    alone, copying, together = _seconds(kind, products), _PAGES_BYTES / after, _seconds(kind, both)
    hidden = (alone + copying - together) / min(alone, copying)
    yield Fact(
        "copies next to computing", f"{hidden:.0%} hidden ({alone:.3f} s and {copying:.3f} s take {together:.3f} s)"
    )


def _copy_rate(kind: DeviceKind, source: Tensor, target: Tensor) -> float:
    return _PAGES_BYTES / _seconds(kind, lambda: target.copy_(source, non_blocking=True))


def _seconds(kind: DeviceKind, work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        work()
        kind.current_stream().synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def streamed_blocks(kind: DeviceKind) -> Iterator[Fact]:
    """Blocks whose weights stream from protected pages, against the same on the device."""
    if not kind.copies_by_itself():
        yield Fact("streamed blocks", _NOTHING)
        return
    from rayltx.comfy_dist.worker_process.block_streaming import BlockStreaming

    width, count = 1024, 6
    store = np.frombuffer(mmap.mmap(-1, count * width * width * 4), np.float32)
    store[:] = np.random.default_rng(0).standard_normal(store.size, dtype=np.float32) / 32
    views = protected_views({str(number): part for number, part in enumerate(np.split(store, count))})
    blocks = [_Block(torch.from_numpy(views[str(number)]).view(width, width)) for number in range(count)]
    x = torch.randn(4096, width, device=kind.name)
    with torch.inference_mode():
        right = x
        for block in blocks:
            right = torch.tanh(right @ block.weight.to(kind.name))
        streaming = BlockStreaming(blocks, torch.device(kind.name), kind)
        wrong = 0
        for _ in range(_FORWARDS):
            out = x
            for block in blocks:
                out = block(out)
            wrong += not torch.equal(out, right)
        streaming.end()
    on_host = all(block.weight.device.type == "cpu" for block in blocks)
    problem = "" if not wrong and on_host else "a block ran on other weights than its own: report this"
    yield Fact(
        "streamed blocks", f"{wrong} of {_FORWARDS} forwards wrong, weights back on the host: {on_host}", problem
    )


class _Block(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


def killed_process(kind: DeviceKind) -> Iterator[Fact]:
    """Until when a killed process, with a kernel running, keeps its memory: a worker that takes its place needs it."""
    if kind.name != "cuda":
        yield Fact("killed process", _NOTHING)
        return
    taken = min(4 * _GIB, kind.free_bytes() // 4)
    code = (
        f"import torch, time; x = torch.empty({taken}, dtype=torch.uint8, device='cuda'); torch.cuda._sleep(1 << 38); "
        "print('go', flush=True); time.sleep(60)"
    )
    torch.empty(1, device=kind.name)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    low = kind.free_bytes()
    started = time.perf_counter()
    process.kill()
    process.wait()
    gone = time.perf_counter() - started
    while kind.free_bytes() < low + 0.9 * taken and time.perf_counter() - started < 60:
        time.sleep(0.05)
    free = time.perf_counter() - started
    yield Fact(
        "killed process",
        f"gone after {gone:.2f} s, its memory free after {free:.2f} s",
        "" if free < 30 else "a worker in its place may find no memory",
    )


def out_of_memory(kind: DeviceKind) -> Iterator[Fact]:
    """Whether the device's own words are known."""
    if kind.name == CPU:
        yield Fact("out of memory", _NOTHING)
        return
    try:
        torch.empty(1 << 44, dtype=torch.uint8, device=kind.name)
    except RuntimeError as error:
        known = is_out_of_memory(error)
        yield Fact(
            "out of memory", f"{type(error).__name__}: {str(error)[:200]}", "" if known else "not known: report this"
        )
    else:
        yield Fact("out of memory", "16 TiB were given", "this driver gives memory that it does not have")


def synchronisations(kind: DeviceKind) -> Iterator[Fact]:
    """Whether the host waits for the device where it should not: in attention and in the merge."""
    if kind.name != "cuda":
        yield Fact("synchronisations", _NOTHING)
        return
    q = torch.randn(1, 4096, 8, 128, device=kind.name, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 1, 4096, device=kind.name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulator = SoftmaxAccumulator()
        for each in (None, mask):
            accumulator.add(*attention_with_lse(q, q, q, each))
        accumulator.result(torch.bfloat16)
    except RuntimeError as error:
        yield Fact("synchronisations", str(error)[:200], "the host waits in every attention: report this")
    else:
        yield Fact("synchronisations", "none")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS = (
    attention_kernels, float32_products, collectives_alone, host_pages, streamed_blocks, killed_process, out_of_memory,
    synchronisations,
)  # fmt: skip
