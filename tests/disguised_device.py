"""A device in disguise: the CPU's numbers under another tag, so that code for GPUs can be tried without one.

Torch's PrivateUse1 backend is named `disguised`. A tensor on it wraps one on the CPU. An operation that mixes it with tensors
of the CPU raises, as on a GPU; what a GPU would wait for (a number that is read, a size that depends on content) and every
transfer is counted, with the line of ours or of ComfyUI's that asked for it. Collectives run on the wrapped tensors, as if
staged through the host. It has no kernels: attention takes the path of devices without one of their own.

What is asked of a stream of its own is done when somebody waits for it, and not before: a copy that nobody waited for has not
happened, and one from a buffer that was filled anew has the new numbers.
"""

from __future__ import annotations

import collections
import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from rayltx.devices import DeviceKind

aten, c10d = torch.ops.aten, torch.ops.c10d
NAME = "disguised"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

# What has a size that depends on content, or is a Python number.
_WAITING = {
    aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten._unique2.default,
    aten.unique_consecutive.default, aten.unique_dim.default, aten.unique_dim_consecutive.default,
    aten.masked_select.default, aten.equal.default,
}  # fmt: skip


_ROOT = str(Path(__file__).parents[1])


@dataclass
class Counts:
    """What a GPU would have been asked for."""

    waits: collections.Counter = field(default_factory=collections.Counter)  # by the place that waits
    to_device: collections.Counter = field(default_factory=collections.Counter)
    to_host: collections.Counter = field(default_factory=collections.Counter)
    collectives: collections.Counter = field(default_factory=collections.Counter)

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()


counts = Counts()


class Disguised(torch.Tensor):
    """`inner` holds the numbers."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Disguised:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"Disguised({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented if _is_for_another(types) else _run(func, args, kwargs or {})


def _is_for_another(types) -> bool:
    """Whether another kind of tensor takes part, such as a quantised one, which does it with the tensors inside of it."""
    return not all(kind in (torch.Tensor, torch.nn.Parameter, Disguised) for kind in types)


def is_disguised(x: object) -> bool:
    return isinstance(x, Disguised)


def bare(obj):
    """The same containers with the tensors inside of the disguise."""
    return tree_map(lambda x: x.inner if is_disguised(x) else x, obj)


def disguise(module: torch.nn.Module) -> torch.nn.Module:
    """Put a module's parameters and buffers on the device, in place."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(Disguised(parameter.data), requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = Disguised(buffer)
    return module


class Stream:
    """Things to do, in order. The main one's are done at once."""

    def __init__(self, is_main: bool = False) -> None:
        self.is_main, self.waiting, self.done = is_main, [], 0

    def wait_event(self, event: Event) -> None:
        if self.is_main:
            event.synchronize()
        elif event.stream is not None and not event.stream.is_main:
            raise NotImplementedError("a stream that waits for another than the main one")

    def synchronize(self) -> None:
        self.run_until(self.done + len(self.waiting))

    def run_until(self, position: int) -> None:
        while self.done < position:
            self.waiting.pop(0)()
            self.done += 1


class Event:
    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.position = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.position = stream, stream.done + len(stream.waiting)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run_until(self.position)


@dataclass(frozen=True)
class DisguisedKind(DeviceKind):
    """The device as `rayltx.devices` knows devices."""

    main: Stream = field(default_factory=lambda: Stream(is_main=True), compare=False)
    current: list[Stream] = field(default_factory=list, compare=False)
    registered: dict[int, int] = field(default_factory=dict, compare=False)  # bytes, by address
    takes_host_memory: bool = True

    def copies_by_itself(self) -> bool:
        return True

    def new_stream(self) -> Stream:
        return Stream()

    @contextlib.contextmanager
    def in_stream(self, stream: Stream) -> Iterator[None]:
        self.current.append(stream)
        with mock.patch.object(_Later, "stream", stream):
            yield
        self.current.pop()

    def current_stream(self) -> Stream:
        return self.current[-1] if self.current else self.main

    def new_event(self) -> Event:
        return Event()

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def register_host_memory(self, address: int, num_bytes: int) -> bool:
        if self.takes_host_memory:
            self.registered[address] = num_bytes
        return self.takes_host_memory

    def unregister_host_memory(self, address: int) -> None:
        del self.registered[address]


class _Later:
    """The stream whose copies are done later."""

    stream: Stream | None = None


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return NotImplemented if _is_for_another(types) else _run(func, args, kwargs or {})


@contextlib.contextmanager
def active() -> Iterator[Counts]:
    """Within it tensors can be made on the device. Gives the counts, cleared."""
    made = torch.tensor  # makes its tensor past every dispatch

    def tensor(data, *args, device=None, **kwargs):
        out = made(data, *args, **kwargs)
        return out if device is None or torch.device(device).type == "cpu" else out.to(device)

    passed_on = dist.batch_isend_irecv  # asks for the device's backend

    def batch_isend_irecv(operations):
        counts.collectives["batch_isend_irecv"] += 1
        return passed_on(
            [dist.P2POp(op.op, bare(op.tensor), group=op.group, group_peer=op.group_peer) for op in operations]
        )

    counts.clear()
    with (
        _Mode(),
        mock.patch.object(torch, "tensor", tensor),
        mock.patch.object(dist, "batch_isend_irecv", batch_isend_irecv),
    ):
        yield counts


def _site() -> str:
    for frame in reversed(traceback.extract_stack()):
        if ("rayltx" in frame.filename or "/comfy/" in frame.filename or frame.filename.startswith(_ROOT)) and (
            "disguised_device" not in frame.filename and "/torch/" not in frame.filename
        ):
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}"
    return "elsewhere"


def _run(func, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    disguised = [x for x in tensors if is_disguised(x)]
    device = kwargs.get("device")
    to_disguised = device is not None and torch.device(device).type == NAME
    if disguised and (func in _WAITING or _indexes_by_mask(func, args)):
        counts.waits[_site()] += 1
        if func in (aten._local_scalar_dense.default, aten.item.default, aten.equal.default):
            return func(*bare(args), **bare(kwargs))
    if func is aten._to_copy.default:
        return _copied(args, kwargs, device, to_disguised)
    if func is aten.copy_.default and is_disguised(args[0]) != is_disguised(args[1]) and args[1].dim() > 0:
        (counts.to_device if is_disguised(args[0]) else counts.to_host)[_site()] += args[1].nbytes
        bare_args, bare_kwargs = bare(args), bare(kwargs)
        if is_disguised(args[0]) and _Later.stream is not None:
            _Later.stream.waiting.append(lambda: func(*bare_args, **bare_kwargs))
        else:
            func(*bare_args, **bare_kwargs)
        return args[0]
    if func.namespace == "c10d":
        counts.collectives[func.name()] += 1
        return func(*bare(args), **bare(kwargs))
    if disguised and func.namespace == "aten" and func not in (aten.index.Tensor, aten.index_put_.default):
        others = [x for x in tensors if not is_disguised(x) and x.dim() > 0]
        if others:
            shapes = [(tuple(x.shape), x.device.type) for x in tensors]
            raise RuntimeError(f"expected all tensors on one device: {func} of {shapes} in {_site()}")
    kwargs = bare(kwargs)
    if device is not None:
        kwargs["device"] = "cpu"
    out = func(*bare(args), **kwargs)
    if not (to_disguised if device is not None else disguised):
        return out
    known = {id(x.inner): x for x in disguised}  # what an operation in place returns is what it was given

    def wrapped(x):
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else Disguised(x)

    return tree_map(wrapped, out)


def _indexes_by_mask(func, args) -> bool:
    return func is aten.index.Tensor and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])


def _copied(args, kwargs, device, to_disguised):
    source = args[0]
    kwargs = dict(kwargs)
    if device is not None:
        kwargs["device"] = "cpu"
        if is_disguised(source) != to_disguised:
            (counts.to_device if to_disguised else counts.to_host)[_site()] += source.nbytes
    out = aten._to_copy.default(*bare(args), **kwargs)
    return Disguised(out) if (to_disguised if device is not None else is_disguised(source)) else out
