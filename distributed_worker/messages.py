"""Objects with tensors inside, as they cross to other processes without copies.

Pickling copies tensors, for each worker anew. So they are taken out of an object while it is pickled, wherever they are, and
travel as bytes that the receiver maps: in memory files on one machine, in Ray's store where there are several.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import pickle
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from ray import cloudpickle
from torch import Tensor

from rayltx.distributed_worker.driver.kept import Kept
from rayltx.distributed_worker.shared_bytes import Access, Segment, SharedBytes
from rayltx.distributed_worker.shared_pages import libc, protected_views

# Smaller tensors travel inside of the message: an object of its own costs about a millisecond.
INLINE_BYTES = 64 * 2**10
_MOST_ENTRIES = 64  # of what was sent: each holds up to four descriptors, of which a process often has a thousand
_CALLS_APART = (
    4  # at most, of two that are sent the same: a guider may ask for so many in a step, each with its own text
)
_ANSWERS = 3


@dataclass
class Mapped:
    """What tensors of one message lie on."""

    segments: dict[int, mmap.mmap] = field(default_factory=dict)  # see `SharedBytes.array`
    written: set[tuple[int, int]] = field(default_factory=set)  # the places that a tensor may write to

    def segments_with(self, data: SharedBytes) -> dict[int, mmap.mmap]:
        """For a tensor that may be written to: others of equal bytes, which were sent once, do not see that."""
        place = id(data.segment), data.offset
        if place in self.written:
            return {}
        self.written.add(place)
        return self.segments


@dataclass(frozen=True)
class WireTensor:
    """A tensor's bytes, or where they are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: np.ndarray | SharedBytes | Kept
    name: str = ""  # of bytes that come again, whatever they arrive in: see `Received`

    def restore(self, mapped: Mapped, as_view: bool) -> Tensor:
        """A tensor on the bytes. mapped: of one message.

        as_view: uncopied, and protected from writing where several processes have it. Else it may be written, and a memory
        file's pages are copied when they are.
        """
        data = self.data
        assert not isinstance(data, Kept), "what Ray keeps is put in its place when a call is loaded"
        if isinstance(data, SharedBytes):
            segments = mapped.segments if as_view else mapped.segments_with(data)
            return tensor_of_bytes(data.array(segments, Access.READ if as_view else Access.OWN), self.dtype, self.shape)
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
    names: dict[int, str] = {}
    large = [number for number, array in enumerate(arrays) if array.nbytes >= INLINE_BYTES]
    if store is not None and large:
        for number, put in zip(large, store.put([arrays[number] for number in large])):
            data[number], names[number] = put.where, put.name
    wires = [
        WireTensor(tensor.dtype, tuple(tensor.shape), data[number], names.get(number, ""))
        for number, tensor in enumerate(pickler.tensors)
    ]
    return Message(file.getvalue(), tuple(wires), as_views)


def unpack(message: Message, known: Callable[[str], object] | None = None, received: Received | None = None) -> Any:
    """Put it together again. Tensors have memory of their own, that may be written, unless the message says otherwise.

    known: what the names stand for that `pack` was told to leave in place of objects. received: what has come before, and is
    the same tensor again.
    """
    mapped = Mapped()
    if received is None or message.as_views:
        tensors = [wire.restore(mapped, message.as_views) for wire in message.tensors]
    else:
        tensors = received.restore(message.tensors, mapped)
    return _Unpickler(message.payload, tensors, known).load()


@dataclass
class _Again:
    """Of `Received`."""

    tensor: Tensor
    version: int
    last_call: int


class Received:
    """What has come to a worker for one model, and comes again: the very same tensor, so that what was made of it can be kept.

    A tensor is known by the name that its sender gives to bytes which it sends once more, and is kept from then on. It is let go
    of when no call has brought it for some time, when it has been written to, and by `clear`.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, torch.dtype, tuple[int, ...]], _Again] = {}
        self._calls = 0

    def restore(self, wires: Sequence[WireTensor], mapped: Mapped) -> list[Tensor]:
        """The tensors of one message. mapped: see `WireTensor.restore`."""
        self._calls += 1
        for key, entry in list(self._entries.items()):
            is_written = entry.tensor._version != entry.version  # noqa: SLF001
            if is_written or self._calls - entry.last_call > _CALLS_APART:
                del self._entries[key]
        return [self._restore(wire, mapped) for wire in wires]

    def _restore(self, wire: WireTensor, mapped: Mapped) -> Tensor:
        key = wire.name, wire.dtype, wire.shape
        entry = self._entries.get(key)
        if entry is None or entry.last_call == self._calls:  # two tensors of equal bytes in one message are two
            tensor = wire.restore(mapped, as_view=False)
            if not wire.name or entry is not None or tensor.is_inference():
                return tensor
            entry = self._entries[key] = _Again(tensor, tensor._version, self._calls)  # noqa: SLF001
        entry.last_call = self._calls
        return entry.tensor

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class Put:
    """Where a tensor's bytes went."""

    where: SharedBytes | Kept
    name: str = ""  # see `WireTensor`


class Store(Protocol):
    """Where large tensors' bytes go when they are sent."""

    def put(self, arrays: Sequence[np.ndarray]) -> Sequence[Put]: ...


class SharedTensors:
    """In one memory file, for as long as the message lives: all workers of this machine map the same bytes."""

    def put(self, arrays: Sequence[np.ndarray]) -> list[Put]:
        return [Put(part) for part in Segment(arrays).parts()]


class AnswerTensors:
    """As `SharedTensors`, in the file of an earlier answer where nobody looks at that any more.

    It owns the files: the last answer's, which stays as it is while its message lives; one to write the next into; and one more
    for who holds an answer for longer, as a sampler of several steps does.
    """

    def __init__(self, max_bytes: int = 128 * 2**20) -> None:
        """max_bytes: of all files that are kept."""
        self._max_bytes = max_bytes
        self._segments: list[Segment] = []  # most recently written last

    def put(self, arrays: Sequence[np.ndarray]) -> list[Put]:
        found = next((segment for segment in self._segments if segment.rewrite(arrays)), None)
        if found is None:
            found = Segment(arrays)
        else:
            self._segments.remove(found)
        self._segments.append(found)
        while len(self._segments) > _ANSWERS or sum(sum(each.sizes) for each in self._segments) > self._max_bytes:
            self._segments.pop(0)
        return [Put(part) for part in found.parts()]

    def clear(self) -> None:
        self._segments.clear()


class KeptTensors:
    """In Ray's store, which brings them to each machine once."""

    def __init__(self, keep: Callable[[np.ndarray], Kept]) -> None:
        self._keep = keep

    def put(self, arrays: Sequence[np.ndarray]) -> list[Put]:
        return [Put(self._keep(array)) for array in arrays]


def _have_same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Of (bytes,) uint8 arrays without gaps. numpy makes an array of as many answers first."""
    if a.nbytes != b.nbytes:
        return False
    # `a.ctypes` would be the slower part of telling two latents apart.
    places = (ctypes.c_void_p(each.__array_interface__["data"][0]) for each in (a, b))
    return not libc().memcmp(*places, ctypes.c_size_t(a.nbytes))


@dataclass(eq=False)
class _Sent:
    """Of `SentTensors`."""

    data: np.ndarray  # (bytes,) uint8
    where: Segment | Kept
    name: str = ""  # another each time that other bytes are there
    first_call: int = 0  # that these bytes were sent with,
    last_call: int = 0  # and the last one


class SentTensors:
    """What has been sent and may be asked for again.

    Text conditioning and masks are the same in every step, though ComfyUI makes new tensors of them each time. They
    are known by their bytes, never by shape or by step, so that what is found is always what was meant.

    The memory files are this store's. What has not been asked for in the last calls, as an earlier step's latent, makes room for
    new bytes of its size, if no worker maps it any more.
    """

    def __init__(self, max_bytes: int = 256 * 2**20, keep: Callable[[np.ndarray], Kept] | None = None) -> None:
        """keep: puts bytes into Ray's store, where the workers are on other machines."""
        self._max_bytes, self._keep = max_bytes, keep
        self._entries: list[_Sent] = []  # most recently used last
        self._calls = 0

    def put(self, arrays: Sequence[np.ndarray]) -> list[Put]:
        """Where bytes equal to these are. The caller keeps it for as long as a worker may need it."""
        self._calls += 1
        return [self._put(array) for array in arrays]

    def _put(self, data: np.ndarray) -> Put:
        for position, entry in enumerate(self._entries):
            if _have_same_bytes(entry.data, data):
                self._entries.append(self._entries.pop(position))
                break
        else:
            entry = self._rewritten(data) or self._new(data)
            entry.name, entry.first_call = secrets.token_hex(8), self._calls
            self._entries.append(entry)
            while len(self._entries) > 1 and self._is_full(0, 0):
                self._entries.pop(0)
        entry.last_call = self._calls
        where = entry.where if isinstance(entry.where, Kept) else entry.where.parts()[0]
        return Put(where, entry.name if entry.first_call < self._calls else "")

    def _new(self, data: np.ndarray) -> _Sent:
        if self._keep is None:
            segment = Segment([data])
            return _Sent(segment.views()[0], segment)  # the shared bytes themselves to compare with: no second copy
        kept = self._keep(data.copy())
        assert kept.source is not None
        return _Sent(kept.source, kept)

    def _rewritten(self, data: np.ndarray) -> _Sent | None:
        """An entry that is not needed any more, with these bytes, taken out of the list."""
        is_full = self._is_full(1, data.nbytes)
        for position, entry in enumerate(self._entries):
            if entry.data.nbytes != data.nbytes or not isinstance(entry.where, Segment):
                continue
            is_idle = self._calls - entry.last_call > _CALLS_APART
            if not is_idle and not (is_full and position == 0):  # which would go next
                continue
            del self._entries[position]  # whatever writing raises: it may have stopped halfway
            if entry.where.rewrite([data]):
                return entry
            self._entries.insert(position, entry)
        return None

    def _is_full(self, more: int, more_bytes: int) -> bool:
        """Whether there is no room for some more entries."""
        num_bytes = sum(entry.data.nbytes for entry in self._entries) + more_bytes
        return len(self._entries) + more > _MOST_ENTRIES or num_bytes > self._max_bytes

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
