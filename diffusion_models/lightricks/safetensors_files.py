"""Opening safetensors files: as the safetensors package does, and those that it refuses for bytes behind their tensors.

Some downloads and tools leave such bytes. What the header describes is whole then, and ComfyUI reads it with dynamic VRAM.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# As safetensors spells them, and the way back.
# Of a file whose first eight bytes, read as the header's length, are no length: text, or another format's mark.
_OF_ANOTHER_KIND = "header too large"
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on
    SAFETENSORS_DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

_LENGTH_BYTES = 8  # of the header's length, in front of it
_MOST_HEADER_BYTES = 100_000_000  # as the safetensors package has it


class SafetensorsFile(Protocol):
    """An open file."""

    def metadata(self) -> Mapping[str, str]: ...

    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype as safetensors spells it, shape) of each tensor, in the order of the file."""
        ...

    def read(self, name: str) -> Tensor:
        """A tensor on a private, copy-on-write mapping of the file."""
        ...


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[SafetensorsFile]:
    """Open a file. Raises SafetensorError for one that is not whole, OSError for one that cannot be read."""
    try:
        opened: Any = safe_open(path, framework="pt")
    except SafetensorError:
        opened = _WithTail.of(path)
        if opened is None:
            raise
    if isinstance(opened, _WithTail):
        yield opened
        return
    with opened as file:
        yield _Whole(file)


class _Whole:
    def __init__(self, file: Any) -> None:
        self._file = file

    def metadata(self) -> Mapping[str, str]:
        return self._file.metadata() or {}

    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        return {name: (slice_.get_dtype(), tuple(slice_.get_shape())) for name, slice_ in slices.items()}

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _WithTail:
    def __init__(self, path: str | os.PathLike[str], header: dict[str, Any], start: int) -> None:
        self._metadata = header.pop("__metadata__", None) or {}
        self._header, self._start = header, start
        # Private, as the package's mapping is: nothing is read before it is used, and nothing is written to the file.
        storage = torch.UntypedStorage.from_file(os.fspath(path), False, os.path.getsize(path))
        self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> _WithTail | None:
        """None unless the header describes tensors that lie one behind the other, and the file goes on behind them."""
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 0 < length <= min(_MOST_HEADER_BYTES, size - _LENGTH_BYTES):
                return None
            text = file.read(length)
        start = _LENGTH_BYTES + length
        try:
            header = json.loads(text)
            end = 0
            for entry in sorted(
                (entry for name, entry in header.items() if name != "__metadata__"),
                key=lambda entry: entry["data_offsets"],
            ):
                begin, after = entry["data_offsets"]
                if not all(type(number) is int and number >= 0 for number in (begin, after, *entry["shape"])):
                    return None
                itemsize = SAFETENSORS_DTYPES[entry["dtype"]].itemsize
                if begin != end or after - begin != math.prod(entry["shape"]) * itemsize:
                    return None
                end = after
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            return None
        return cls(path, header, start) if start + end < size else None

    def metadata(self) -> Mapping[str, str]:
        return self._metadata

    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in self._header.items()}

    def read(self, name: str) -> Tensor:
        entry = self._header[name]
        begin, after = (self._start + offset for offset in entry["data_offsets"])
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        found = self._bytes[begin:after]
        if begin % dtype.itemsize:  # cannot be seen as numbers where it lies
            found = found.clone()
        return found.view(dtype).view(entry["shape"])


def damage_of(error: Exception) -> str:
    """What a file is that the safetensors package does not read: of another kind, or cut. error: what it said."""
    if _OF_ANOTHER_KIND in str(error):
        return f"no safetensors file, whatever its name says, or damaged at its beginning ({error})"
    return f"not a whole safetensors file ({error}); download it again"
