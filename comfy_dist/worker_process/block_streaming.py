"""The weights that a card does not hold, brought a block ahead.

ComfyUI leaves layers on the host that do not fit, and copies each when it runs, one layer ahead at most, from memory that
CUDA cannot read by itself. Here the layers of the next block travel while this one computes: from pages of the shared copy
that are registered with the driver, or through two small buffers where they cannot be. For the time of its block a layer has
its weight on the device; the numbers are the same, and everything ComfyUI does with them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rayltx.devices import DeviceKind
from rayltx.distributed_worker.shared_pages import register_pages_of

logger = logging.getLogger(__name__)

_ALIGNMENT = 512  # bytes, of what kernels read
_BOUNCE_BYTES = 32 * 2**20
_SLOTS = 2  # the block that computes, and the next


def reserved_bytes(blocks: Sequence[nn.Module]) -> int:
    """What streaming takes of the device's memory at most: all of the largest block, in each slot."""
    sizes = (sum(_rounded(t.nbytes) for p in block.parameters() for t in _parts(p)) for block in blocks)
    return _SLOTS * max(sizes, default=0)


@dataclass
class _Streamed:
    """A weight that lies on the host."""

    layer: nn.Module
    name: str
    host: nn.Parameter
    parts: list[Tensor]  # that it consists of
    offsets: list[int]  # of those in a slot

    def is_there(self) -> bool:
        """Whether it is still the layer's: hooks put patched ones in its place."""
        now = getattr(self.layer, self.name)
        return now is not None and now.device.type == "cpu" and _parts(now)[0].data_ptr() == self.parts[0].data_ptr()

    def copied_into(self, buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(part on the host, its place on the device) of each."""
        pairs = []
        for part, offset in zip(self.parts, self.offsets):
            place = buffer[offset : offset + part.nbytes].view(part.dtype).view(part.shape)
            pairs.append((part, place))
        return pairs

    def on_device(self, buffer: Tensor) -> nn.Parameter:
        return nn.Parameter(_with_parts(self.host, [d for _, d in self.copied_into(buffer)]), requires_grad=False)


@dataclass
class _Slot:
    """Memory on the device for a block's weights."""

    buffer: Tensor
    arrived: Any  # event: the copies are done
    free: Any  # event: the block that used it is done
    holds: int | None = None  # the block's number
    put: list[tuple[_Streamed, nn.Parameter]] = field(default_factory=list)  # in layers, with what was there


class BlockStreaming:
    """Streams what is on the host of a model's blocks, until it is ended.

    Blocks run in their order, as an LTX model's do; one that is left out or runs twice costs a copy that is waited for.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, kind: DeviceKind) -> None:
        """Raises what the device raises when it has no memory for the slots."""
        self._kind = kind
        self._blocks = {number: found for number, block in enumerate(blocks) if (found := _on_host(block))}
        self._order = sorted(self._blocks)
        num_bytes = max((_end(found) for found in self._blocks.values()), default=0)
        self._slots: list[_Slot] = []
        self._handles: list[RemovableHandle] = []
        if not num_bytes:
            return
        self._side, self._bounce = kind.new_stream(), _Bounce(kind)
        for _ in range(min(_SLOTS, len(self._order))):
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            slot = _Slot(buffer, kind.new_event(), kind.new_event())
            slot.free.record(kind.current_stream())  # whatever had this memory before may not be done
            self._slots.append(slot)
        parts = [part for found in self._blocks.values() for item in found for part in item.parts]
        self._registered = {part.data_ptr() for part in parts if register_pages_of(part, kind)}
        for number in self._order:
            take, drop = self._hooks(number)
            self._handles += [
                blocks[number].register_forward_pre_hook(take),
                blocks[number].register_forward_hook(drop, always_call=True),
            ]
        by_itself = sum(part.nbytes for part in parts if part.data_ptr() in self._registered)
        logger.info(
            "%d of %d blocks stream from the host, a block ahead: %.2f GiB a step, %.2f GiB of them read by the device itself",
            len(self._order), len(blocks), sum(part.nbytes for part in parts) / 2**30, by_itself / 2**30,
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Of the device's memory."""
        return sum(slot.buffer.nbytes for slot in self._slots)

    def end(self) -> None:
        """Leave the blocks as they were, and nothing under way. May be called again."""
        if self._slots:
            self._side.synchronize()
        for handle in self._handles:
            handle.remove()
        for slot in self._slots:
            _put_back(slot)
        self._handles, self._slots = [], []

    def _hooks(self, number: int) -> tuple[Any, Any]:
        def take(block: nn.Module, args: Any) -> None:
            self._take(number)

        def drop(block: nn.Module, args: Any, out: Any) -> None:
            self._drop(number)

        return take, drop

    def _take(self, number: int) -> None:
        """Put a block's weights into its layers."""
        slot = self._slot_of(number) or self._send(number, self._slots[0])
        self._kind.current_stream().wait_event(slot.arrived)
        for item in self._blocks[number]:
            if item.is_there():
                slot.put.append((item, getattr(item.layer, item.name)))
                setattr(item.layer, item.name, item.on_device(slot.buffer))

    def _drop(self, number: int) -> None:
        """Take them out again, and send for the next block's while this one computes."""
        slot = self._slot_of(number)
        if slot is None:
            return  # its hook before failed
        _put_back(slot)
        slot.free.record(self._kind.current_stream())
        following = self._order[(self._order.index(number) + 1) % len(self._order)]
        if self._slot_of(following) is None:
            self._send(following, next(other for other in self._slots if other is not slot))

    def _slot_of(self, number: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == number), None)

    def _send(self, number: int, slot: _Slot) -> _Slot:
        """Start to copy a block into a slot, once the block that used it is done. Returns the slot."""
        slot.holds = None
        with self._kind.in_stream(self._side):
            self._side.wait_event(slot.free)
            for item in self._blocks[number]:
                for part, place in item.copied_into(slot.buffer):
                    if part.data_ptr() in self._registered:
                        place.copy_(part, non_blocking=True)
                    else:
                        self._bounce.copy(part, place, self._side)
            slot.arrived.record(self._side)
        slot.holds = number
        return slot


class _Bounce:
    """Two buffers that the device reads by itself, for memory that it cannot. The host fills one while the other is read."""

    def __init__(self, kind: DeviceKind) -> None:
        self._kind = kind
        self._buffers: list[tuple[Tensor, Any]] = []  # with an event: it has been read

    def copy(self, part: Tensor, place: Tensor, stream: Any) -> None:
        if not self._buffers:
            self._buffers = [(self._kind.host_buffer(_BOUNCE_BYTES), self._kind.new_event()) for _ in range(2)]
        source, target = part.reshape(-1).view(torch.uint8), place.view(-1).view(torch.uint8)
        for start in range(0, source.numel(), _BOUNCE_BYTES):
            piece = source[start : start + _BOUNCE_BYTES]
            buffer, read = self._buffers[0]
            read.synchronize()
            buffer[: piece.numel()].copy_(piece)
            target[start : start + piece.numel()].copy_(buffer[: piece.numel()], non_blocking=True)
            read.record(stream)
            self._buffers.reverse()


def _put_back(slot: _Slot) -> None:
    for item, before in slot.put:
        setattr(item.layer, item.name, before)
    slot.put.clear()


def _on_host(block: nn.Module) -> list[_Streamed]:
    """What ComfyUI left on the host of a block's weights, with their places in a slot."""
    found, offset = [], 0
    for layer in block.modules():
        # Tables of modulation, too: the model brings them itself, by a copy that the host waits for.
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.device.type != "cpu":
                continue
            parts, offsets = _parts(parameter), []
            for part in parts:
                offsets.append(offset)
                offset += _rounded(part.nbytes)
            found.append(_Streamed(layer, name, parameter, parts, offsets))
    return found


def _end(found: Sequence[_Streamed]) -> int:
    return max(offset + _rounded(part.nbytes) for item in found for part, offset in zip(item.parts, item.offsets))


def _rounded(num_bytes: int) -> int:
    return math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a weight consists of: of a quantised one, its numbers and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):  # not of `.data`, which has scales of its own
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def _with_parts(tensor: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The same weight of other plain tensors."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return parts[0]
    names, context = tensor.__tensor_flatten__()
    quantised: Any = type(tensor)
    return quantised.__tensor_unflatten__(dict(zip(names, parts)), context, tensor.shape, tensor.stride())
