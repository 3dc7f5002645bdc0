"""Objects with tensors inside, as Ray carries them without copies.

Ray copies torch tensors through pickle, each worker for itself; NumPy arrays it maps. So tensors are taken out of an
object while it is pickled, wherever they are, and travel as bytes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray import cloudpickle
from torch import Tensor

from rayltx.distributed_worker.shared_pages import protected_views

# Smaller tensors travel inside of the message: an object of its own costs about a millisecond.
INLINE_BYTES = 64 * 2**10


@dataclass(frozen=True)
class WireTensor:
    """A tensor's bytes, or where they are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: np.ndarray | ray.ObjectRef

    def restore(self) -> Tensor:
        """A tensor on the bytes, uncopied. What lies in the object store is protected from writing."""
        data = self.data
        if isinstance(data, ray.ObjectRef):
            data = protected_views({"": ray.get(data)})[""]
        return tensor_of_bytes(data, self.dtype, self.shape)


@dataclass(frozen=True)
class Message:
    """An object as it crosses to another process."""

    payload: bytes
    tensors: tuple[WireTensor, ...]
    as_views: bool = False  # whether the receiver gets tensors on the store's own bytes, protected from writing

    def is_same(self, other: Message) -> bool:
        """Whether both hold the same bytes. Only for messages whose tensors travel inside."""
        return (self.payload, len(self.tensors)) == (other.payload, len(other.tensors)) and all(
            (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a.data, b.data)
            for a, b in zip(self.tensors, other.tensors)
        )


def bytes_of_tensor(tensor: Tensor) -> np.ndarray:
    """The tensor's elements as (bytes,) uint8; on CPU and contiguous, uncopied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat = flat.as_strided((flat.numel(),), (1,))  # a single element can have any stride, and no other view then
    return flat.view(torch.uint8).numpy()


def tensor_of_bytes(data: np.ndarray, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The reverse, uncopied. The tensor keeps `data` alive."""
    if data.nbytes == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    if not data.flags.writeable:
        # The same bytes: torch warns of the mark, and ignores it.
        data = np.asarray(_Unmarked(data))
    return torch.from_numpy(data).view(dtype).view(tuple(shape))


class _Unmarked:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


Refer = Callable[[object], "str | None"]
"""The name under which the receiver knows an object already, or None for what has to be sent."""


class _Pickler(cloudpickle.Pickler):
    """Pickles closures and classes too, and leaves references in place of tensors and of what the receiver has."""

    def __init__(self, file: io.BytesIO, refer: Refer | None) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._refer = refer

    def persistent_id(self, obj: object) -> int | str | None:
        if self._refer is not None:
            name = self._refer(obj)
            if name is not None:
                return name
        if not isinstance(obj, Tensor) or type(obj) not in (Tensor, torch.nn.Parameter):
            return None
        if obj.layout != torch.strided or obj.is_quantized:
            return None
        number = self._numbers.get(id(obj))
        if number is None:
            number = self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)  # alive until the message is complete, so that its id stays its own
        return number


class _Unpickler(pickle.Unpickler):
    def __init__(self, payload: bytes, tensors: list[Tensor], known: Callable[[str], object] | None) -> None:
        super().__init__(io.BytesIO(payload))
        self._tensors, self._known = tensors, known

    def persistent_load(self, reference: int | str) -> object:
        if isinstance(reference, int):
            return self._tensors[reference]
        assert self._known is not None, f"a reference to {reference}, which nobody here knows"
        return self._known(reference)


def pack(obj: object, store: Store | None = None, refer: Refer | None = None, as_views: bool = False) -> Message:
    """Take an object apart. With a store, large tensors go into the object store; without, they travel inside.

    refer: names what the receiver knows already, and is not sent. as_views: see `Message`.
    Raises what pickling raises for what cannot cross a process border.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, refer)
    pickler.dump(obj)
    wires = []
    for tensor in pickler.tensors:
        data: np.ndarray | ray.ObjectRef = bytes_of_tensor(tensor)
        if store is not None and data.nbytes >= INLINE_BYTES:
            data = store.put(data)
        wires.append(WireTensor(tensor.dtype, tuple(tensor.shape), data))
    return Message(file.getvalue(), tuple(wires), as_views)


def unpack(message: Message, known: Callable[[str], object] | None = None) -> Any:
    """Put it together again. Tensors have memory of their own, that may be written, unless the message says otherwise.

    known: what the names stand for that `pack` was told to leave in place of objects.
    """
    tensors = [wire.restore() if message.as_views else wire.restore().clone() for wire in message.tensors]
    return _Unpickler(message.payload, tensors, known).load()


class Store(Protocol):
    def put(self, data: np.ndarray) -> ray.ObjectRef: ...


class SharedTensors:
    """Tensors go into the object store, for as long as the message lives: all workers map the same bytes."""

    def put(self, data: np.ndarray) -> ray.ObjectRef:
        return ray.put(data)


class SentTensors:
    """What has been put into the object store and may be asked for again.

    Text conditioning and masks are the same in every step, though ComfyUI makes new tensors of them each time. They
    are known by their bytes, never by shape or by step, so that what is found is always what was meant.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._entries: list[tuple[np.ndarray, ray.ObjectRef]] = []  # most recently used last

    def put(self, data: np.ndarray) -> ray.ObjectRef:
        """A reference to bytes equal to these. The caller keeps it for as long as a worker may need it."""
        for position, (known, reference) in enumerate(self._entries):
            if known.nbytes == data.nbytes and np.array_equal(known[:64], data[:64]) and np.array_equal(known, data):
                self._entries.append(self._entries.pop(position))
                return reference
        reference = ray.put(data)
        # Keep the store's own mapping to compare with: no second copy of the bytes.
        self._entries.append((ray.get(reference), reference))
        while len(self._entries) > 1 and sum(known.nbytes for known, _ in self._entries) > self._max_bytes:
            self._entries.pop(0)
        return reference

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
