"""Is the header of a GGUF file whole? Asked before the gguf package reads it.

That package trusts the counts and lengths in a file: where they point past its end it sees an empty array, and either
fails far from the cause (IndexError, ValueError, KeyError, OverflowError) or goes on for as many rounds as the count
says. Here every count is compared with the bytes that are left, and what is wrong is said by the tensor's name.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

from rayltx.errors import CheckpointError
from rayltx.expansion.comfyui_gguf.quant_types import num_bytes

_VERSIONS = (2, 3)  # 1 counts in 32 bits, and has not been written since 2023
_MOST_DIMS = 4
_MOST_NESTED = 4  # arrays in arrays; the specification sets no limit, recursion does
_LEAST_FIELD_BYTES, _LEAST_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8

_V = GGUFValueType
_FORMATS = {
    _V.UINT8: "B", _V.INT8: "b", _V.BOOL: "B", _V.UINT16: "H", _V.INT16: "h", _V.UINT32: "I", _V.INT32: "i",
    _V.FLOAT32: "f", _V.UINT64: "Q", _V.INT64: "q", _V.FLOAT64: "d",
}  # fmt: skip


def check_header(path: Path) -> None:
    """Raises CheckpointError, by file, tensor and reason, if the file is not a GGUF or holds less than it says."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with path.open("rb") as file:
        _HeaderCheck(path, file).run()


class _HeaderCheck:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.at = 0  # bytes read so far
        self.where = "header"

    def run(self) -> None:
        self._check_magic()
        num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
        for what, count, least in (
            ("metadata fields", num_fields, _LEAST_FIELD_BYTES),
            ("tensors", num_tensors, _LEAST_TENSOR_BYTES),
        ):
            if count * least > self.size - self.at:
                raise self._error(f"its header speaks of {count} {what}, for which {self.size} bytes have no room")
        alignment = self._check_fields(num_fields)
        tensors = self._read_tensors(num_tensors)
        data_start = -(-self.at // alignment) * alignment
        for name, (type, dims, offset) in tensors.items():
            self._check_tensor(name, type, dims, offset, data_start, alignment)

    def _check_magic(self) -> None:
        start = self.file.read(8)
        self.at = len(start)
        if len(start) < 8 or struct.unpack("<I", start[:4])[0] != GGUF_MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file: it begins with {start[:4]!r}, not with b'GGUF'")
        version = struct.unpack("<I", start[4:])[0]
        if version & 0xFFFF == 0:
            raise self._error("its numbers are in big-endian order; convert it on the machine that it was made for")
        if version not in _VERSIONS:
            raise self._error(f"it is of GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are known")

    def _check_fields(self, count: int) -> int:
        """Returns the alignment of tensors."""
        alignment = GGUF_DEFAULT_ALIGNMENT
        names = set()
        for number in range(count):
            self.where = f"metadata field {number + 1} of {count}"
            name = self._string()
            self.where = f"metadata field {name}"
            if name in names:
                raise self._error("it is there twice")
            names.add(name)
            type = self._value_type()
            value = self._value(type, _MOST_NESTED)
            if name == "general.alignment":
                if type != GGUFValueType.UINT32 or value == 0 or value & (value - 1):
                    raise self._error(f"{value!r} ({type.name}) is not a power of two as UINT32")
                alignment = value
        return alignment

    def _value_type(self) -> GGUFValueType:
        number = self._scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._error(f"its value type {number} is not known") from None

    def _value(self, type: GGUFValueType, nested: int) -> Any:
        """A scalar's value; None for what is skipped."""
        if type == GGUFValueType.STRING:
            return self._string()
        if type != GGUFValueType.ARRAY:
            return self._scalar(_FORMATS[type])
        if nested == 0:
            raise self._error(f"arrays in more than {_MOST_NESTED} arrays")
        item, length = self._value_type(), self._scalar("Q")
        if item in _FORMATS:
            self._skip(length * struct.calcsize("<" + _FORMATS[item]))
            return None
        if length * 8 > self.size - self.at:
            raise self._error(f"an array of {length} items, where {self.size - self.at} bytes are left")
        for _ in range(length):
            self._value(item, nested - 1)
        return None

    def _read_tensors(self, count: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
        tensors: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for number in range(count):
            self.where = f"tensor {number + 1} of {count}"
            name = self._string()
            self.where = f"tensor {name}"
            if name in tensors:
                raise self._error("it is there twice")
            num_dims = self._scalar("I")
            if num_dims > _MOST_DIMS:
                raise self._error(f"{num_dims} dimensions; a GGUF tensor has at most {_MOST_DIMS}")
            dims = tuple(self._scalar("Q") for _ in range(num_dims))
            tensors[name] = self._scalar("I"), dims, self._scalar("Q")
        return tensors

    def _check_tensor(
        self, name: str, type_number: int, dims: tuple[int, ...], offset: int, data_start: int, alignment: int
    ) -> None:
        self.where = f"tensor {name}"
        try:
            type = GGMLQuantizationType(type_number)
        except ValueError:
            raise self._error(
                f"its type {type_number} is not known to this gguf package; a newer one may know"
            ) from None
        block_size = GGML_QUANT_SIZES[type][0]
        in_row = dims[0] if dims else 1
        if in_row % block_size:
            raise self._error(
                f"rows of {in_row} elements are not whole blocks of {type.name}, which are of {block_size}"
            )
        if offset % alignment:
            raise self._error(f"its offset {offset} is not a multiple of the alignment {alignment}")
        end = data_start + offset + num_bytes(type, math.prod(dims))
        if end > self.size:
            raise self._error(f"it ends at byte {end}, the file at {self.size}: the file is cut; download it again")

    def _scalar(self, format: str) -> Any:
        return struct.unpack("<" + format, self._bytes(struct.calcsize("<" + format)))[0]

    def _string(self) -> str:
        content = self._bytes(self._scalar("Q"))
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise self._error(f"a text that is not UTF-8 ({error})") from None

    def _bytes(self, count: int) -> bytes:
        self._take(count)
        content = self.file.read(count)
        assert len(content) == count, "the file became shorter while it was read"
        return content

    def _skip(self, count: int) -> None:
        self._take(count)
        self.file.seek(count, 1)

    def _take(self, count: int) -> None:
        if count > self.size - self.at:
            raise self._error(
                f"{count} bytes are needed and {self.size - self.at} are left: the file is cut or damaged; download it again"
            )
        self.at += count

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.where}: {reason}")
