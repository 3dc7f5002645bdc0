"""Objects with tensors inside, as they cross to other processes without copies.

Pickling copies tensors, for each worker anew. So they are taken out of an object while it is pickled, wherever they are, and
travel as bytes that the receiver maps: in memory files on one machine, in Ray's store where there are several.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from ray import cloudpickle
from torch import Tensor

from rayltx.distributed_worker.driver.kept import Kept
from rayltx.distributed_worker.shared_bytes import Access, Segment, SharedBytes, shared
from rayltx.distributed_worker.shared_pages import libc, protected_views

# Smaller tensors travel inside of the message: an object of its own costs about a millisecond.
INLINE_BYTES = 64 * 2**10
_MOST_ENTRIES = 64  # of what was sent: each holds two descriptors, of which a process often has a thousand


@dataclass(frozen=True)
class WireTensor:
    """A tensor's bytes, or where they are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: np.ndarray | SharedBytes | Kept

    def restore(self, mapped: dict[int, mmap.mmap], as_view: bool) -> Tensor:
        """A tensor on the bytes. mapped: see `SharedBytes`; of one kind of views.

        as_view: uncopied, and protected from writing where several processes have it. Else it may be written, and a memory
        file's pages are copied when they are.
        """
        data = self.data
        assert not isinstance(data, Kept), "what Ray keeps is put in its place when a call is loaded"
        if isinstance(data, SharedBytes):
            return tensor_of_bytes(data.array(mapped, Access.READ if as_view else Access.OWN), self.dtype, self.shape)
        if not data.flags.writeable and data.nbytes >= INLINE_BYTES:
            data = protected_views({"": data})[""]  # from Ray's store, whose pages can be written
        tensor = tensor_of_bytes(data, self.dtype, self.shape)
        return tensor if as_view else tensor.clone()


@dataclass(frozen=True)
class Message:
    """An object as it crosses to another process."""

    payload: bytes
    tensors: tuple[WireTensor, ...]
    as_views: bool = False  # whether the receiver gets tensors on the store's own bytes, protected from writing

    def is_same(self, other: Message) -> bool:
        """Whether both hold the same bytes. Only for messages whose tensors travel inside."""
        return (self.payload, len(self.tensors)) == (other.payload, len(other.tensors)) and all(
            (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a.data, b.data)  # type: ignore[arg-type]
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
    """Take an object apart. With a store, large tensors go there; without, they travel inside.

    refer: names what the receiver knows already, and is not sent. as_views: see `Message`.
    Raises what pickling raises for what cannot cross a process border.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, refer)
    pickler.dump(obj)
    arrays = [bytes_of_tensor(tensor) for tensor in pickler.tensors]
    data: list[np.ndarray | SharedBytes | Kept] = [*arrays]
    large = [number for number, array in enumerate(arrays) if array.nbytes >= INLINE_BYTES]
    if store is not None and large:
        for number, put in zip(large, store.put([arrays[number] for number in large])):
            data[number] = put
    wires = [WireTensor(tensor.dtype, tuple(tensor.shape), bytes_) for tensor, bytes_ in zip(pickler.tensors, data)]
    return Message(file.getvalue(), tuple(wires), as_views)


def unpack(message: Message, known: Callable[[str], object] | None = None) -> Any:
    """Put it together again. Tensors have memory of their own, that may be written, unless the message says otherwise.

    known: what the names stand for that `pack` was told to leave in place of objects.
    """
    mapped: dict[int, mmap.mmap] = {}
    tensors = [wire.restore(mapped, message.as_views) for wire in message.tensors]
    return _Unpickler(message.payload, tensors, known).load()


class Store(Protocol):
    """Where large tensors' bytes go when they are sent."""

    def put(self, arrays: Sequence[np.ndarray]) -> Sequence[SharedBytes | Kept]: ...


class SharedTensors:
    """In one memory file, for as long as the message lives: all workers of this machine map the same bytes."""

    def put(self, arrays: Sequence[np.ndarray]) -> list[SharedBytes]:
        return Segment(arrays).parts([array.nbytes for array in arrays])


class KeptTensors:
    """In Ray's store, which brings them to each machine once."""

    def __init__(self, keep: Callable[[np.ndarray], Kept]) -> None:
        self._keep = keep

    def put(self, arrays: Sequence[np.ndarray]) -> list[Kept]:
        return [self._keep(array) for array in arrays]


def _have_same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Of (bytes,) uint8 arrays without gaps. numpy makes an array of as many answers first."""
    return a.nbytes == b.nbytes and not libc().memcmp(a.ctypes, b.ctypes, ctypes.c_size_t(a.nbytes))


class SentTensors:
    """What has been sent and may be asked for again.

    Text conditioning and masks are the same in every step, though ComfyUI makes new tensors of them each time. They
    are known by their bytes, never by shape or by step, so that what is found is always what was meant.
    """

    def __init__(self, max_bytes: int = 256 * 2**20, keep: Callable[[np.ndarray], Kept] | None = None) -> None:
        """keep: puts bytes into Ray's store, where the workers are on other machines."""
        self._max_bytes, self._keep = max_bytes, keep
        self._entries: list[tuple[np.ndarray, SharedBytes | Kept]] = []  # most recently used last

    def put(self, arrays: Sequence[np.ndarray]) -> list[SharedBytes | Kept]:
        """Where bytes equal to these are. The caller keeps it for as long as a worker may need it."""
        return [self._put(array) for array in arrays]

    def _put(self, data: np.ndarray) -> SharedBytes | Kept:
        for position, (known, where) in enumerate(self._entries):
            if _have_same_bytes(known, data):
                self._entries.append(self._entries.pop(position))
                return where
        if self._keep is None:
            segment = shared(data)
            self._entries.append(
                (segment.array(), segment)
            )  # the shared bytes themselves to compare with: no second copy
        else:
            kept = self._keep(data.copy())
            assert kept.source is not None
            self._entries.append((kept.source, kept))
        while len(self._entries) > 1 and (
            len(self._entries) > _MOST_ENTRIES or sum(known.nbytes for known, _ in self._entries) > self._max_bytes
        ):
            self._entries.pop(0)
        return self._entries[-1][1]

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


# ---- calls


class _CallPickler(cloudpickle.Pickler):
    """Leaves numbers in the place of what Ray keeps."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.kept: list[Kept] = []

    def persistent_id(self, obj: object) -> int | None:
        if not isinstance(obj, Kept):
            return None
        self.kept.append(obj)
        return len(self.kept) - 1


class _CallUnpickler(pickle.Unpickler):
    def __init__(self, payload: bytes, kept: Sequence[object]) -> None:
        super().__init__(io.BytesIO(payload))
        self._kept = kept

    def persistent_load(self, number: int) -> object:
        return self._kept[number]


def dump_call(call: object) -> tuple[bytes, list[Kept]]:
    """A call of a worker as bytes, and what Ray has to hand over with them."""
    file = io.BytesIO()
    pickler = _CallPickler(file)
    pickler.dump(call)
    return file.getvalue(), pickler.kept


def load_call(payload: bytes, kept: Sequence[object]) -> Any:
    """The reverse, with the kept objects in their places."""
    return _CallUnpickler(payload, kept).load()
