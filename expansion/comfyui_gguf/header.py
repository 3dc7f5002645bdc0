"""The header of a GGUF file: its metadata, and where its tensors lie. Read once, each count checked as it is read.

The gguf package's own reader trusts the counts and lengths in a file: where they point past its end it sees an empty
array, and either fails far from the cause (IndexError, ValueError, KeyError, OverflowError) or goes on for as many rounds
as the count says. So the header is read here: every count is compared with the bytes that are left, and what is wrong is
said by the tensor's name. Types, block sizes and the decoding of metadata are that package's, and the tests compare what
is found with its reader.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, ReaderField

from rayltx.errors import CheckpointError
from rayltx.expansion.comfyui_gguf.quant_types import PLAIN_DTYPES, num_bytes
from rayltx.whole_files import check_is_file

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # 1 counts in 32 bits, and has not been written since 2023
_MOST_DIMS = 4
_MOST_NESTED = 4  # arrays in arrays; the specification sets no limit, recursion does
_LEAST_FIELD_BYTES, _LEAST_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8

_V = GGUFValueType
_NUMBERS = {
    _V.UINT8: "u1", _V.INT8: "i1", _V.BOOL: "?", _V.UINT16: "<u2", _V.INT16: "<i2", _V.UINT32: "<u4", _V.INT32: "<i4",
    _V.FLOAT32: "<f4", _V.UINT64: "<u8", _V.INT64: "<i8", _V.FLOAT64: "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # of the values, in torch's order
    offset: int  # in the file, in bytes
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_quantised(self) -> bool:
        return self.type not in PLAIN_DTYPES

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of its bytes as uint8: whole rows where rows are whole blocks, blocks otherwise."""
        block_size, type_size = GGML_QUANT_SIZES[self.type]
        if self.shape and self.shape[-1] % block_size == 0:
            return (*self.shape[:-1], self.shape[-1] // block_size * type_size)
        return (self.num_bytes // type_size, type_size)


@dataclass(frozen=True)
class Header:
    """Both by name, in the file's order. `fields` are as `gguf.GGUFReader.fields`, on a mapping of the file."""

    fields: dict[str, ReaderField]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> Header:
    """Raises CheckpointError, by file, tensor and reason, if the file is not a GGUF or holds less than it says."""
    check_is_file(path)
    with path.open("rb") as file:
        start = file.read(len(MAGIC) + 4)  # and the version
        if len(start) < len(MAGIC) + 4 or not start.startswith(MAGIC):
            raise CheckpointError(f"{path}: not a GGUF file: it begins with {start[:4]!r}, not with {MAGIC!r}")
        try:
            data = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: it cannot be mapped ({error})") from error
    return _HeaderReader(path, data).read()


class _HeaderReader:
    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data = path, data
        self.at = len(MAGIC)  # the next byte to be read
        self.where = "header"

    def read(self) -> Header:
        self._check_version()
        num_tensors, num_fields = self._number("<u8"), self._number("<u8")
        for what, count, least in (
            ("metadata fields", num_fields, _LEAST_FIELD_BYTES),
            ("tensors", num_tensors, _LEAST_TENSOR_BYTES),
        ):
            if count * least > self._left:
                raise self._error(f"its header speaks of {count} {what}, for which {len(self.data)} bytes have no room")
        fields = self._fields(num_fields)
        alignment = self._alignment(fields.get("general.alignment"))
        infos = self._tensor_infos(num_tensors)
        data_start = -(-self.at // alignment) * alignment
        return Header(fields, {name: self._tensor(name, *info, data_start, alignment) for name, info in infos.items()})

    def _check_version(self) -> None:
        version = self._number("<u4")
        if version & 0xFFFF == 0:
            raise self._error("its numbers are in big-endian order; convert it on the machine that it was made for")
        if version not in _VERSIONS:
            raise self._error(f"it is of GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are known")

    # ---- metadata

    def _fields(self, count: int) -> dict[str, ReaderField]:
        fields: dict[str, ReaderField] = {}
        for number in range(count):
            start = self.at
            name = self._name("metadata field", number, count, fields)
            type = self._value_type()
            if type == GGUFValueType.ARRAY:
                item, parts = self._array(_MOST_NESTED)
                types = [type, item]
            else:
                types, parts = [type], [self._value(type)]
            fields[name] = ReaderField(start, name, parts, list(range(len(parts))), types)
        return fields

    def _array(self, nested: int) -> tuple[GGUFValueType, list[np.ndarray]]:
        """The type of the innermost items, and these: numbers in one part for all, texts in one for each."""
        if nested == 0:
            raise self._error(f"arrays in more than {_MOST_NESTED} arrays")
        item, length = self._value_type(), self._number("<u8")
        if item in _NUMBERS:
            return item, [self._take(_NUMBERS[item], length)]
        if length * 8 > self._left:
            raise self._error(f"an array of {length} items, where {self._left} bytes are left")
        if item == GGUFValueType.STRING:
            return item, [self._text() for _ in range(length)]
        inner = [self._array(nested - 1) for _ in range(length)]
        return (inner[0][0] if inner else item), [part for _, parts in inner for part in parts]

    def _value(self, type: GGUFValueType) -> np.ndarray:
        return self._text() if type == GGUFValueType.STRING else self._take(_NUMBERS[type])

    def _value_type(self) -> GGUFValueType:
        number = self._number("<u4")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._error(f"its value type {number} is not known") from None

    def _alignment(self, field: ReaderField | None) -> int:
        """Of tensors' data."""
        if field is None:
            return GGUF_DEFAULT_ALIGNMENT
        self.where = f"metadata field {field.name}"
        alignment, type = field.contents(), field.types[0]
        if type != GGUFValueType.UINT32 or alignment == 0 or alignment & (alignment - 1):
            raise self._error(f"{alignment!r} ({type.name}) is not a power of two as UINT32")
        return alignment

    # ---- tensors

    def _tensor_infos(self, count: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
        """By name: the number of the type, dimensions, the row's first; and the offset behind the header."""
        infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for number in range(count):
            name = self._name("tensor", number, count, infos)
            num_dims = self._number("<u4")
            if num_dims > _MOST_DIMS:
                raise self._error(f"{num_dims} dimensions; a GGUF tensor has at most {_MOST_DIMS}")
            dims = tuple(self._number("<u8") for _ in range(num_dims))
            infos[name] = self._number("<u4"), dims, self._number("<u8")
        return infos

    def _tensor(
        self, name: str, type_number: int, dims: tuple[int, ...], offset: int, data_start: int, alignment: int
    ) -> GGUFTensor:
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
        tensor = GGUFTensor(type, tuple(reversed(dims)), data_start + offset, num_bytes(type, math.prod(dims)))
        end = tensor.offset + tensor.num_bytes
        if end > len(self.data):
            raise self._error(
                f"it ends at byte {end}, the file at {len(self.data)}: the file is cut; download it again"
            )
        if math.prod(max(dim, 1) for dim in dims) >= 2**60:  # next to a dimension of 0: no bytes, but strides
            raise self._error(f"its dimensions {dims} are more than can be counted")
        return tensor

    # ---- what all of it is made of

    def _name(self, what: str, number: int, count: int, known: dict[str, Any]) -> str:
        self.where = f"{what} {number + 1} of {count}"
        name = self._text().tobytes().decode()
        self.where = f"{what} {name}"
        if name in known:
            raise self._error("it is there twice")
        return name

    def _text(self) -> np.ndarray:
        """Its bytes, which are UTF-8."""
        content = self._take("u1", self._number("<u8"))
        try:
            content.tobytes().decode()
        except UnicodeDecodeError as error:
            raise self._error(f"a text that is not UTF-8 ({error})") from None
        return content

    def _number(self, dtype: str) -> int:
        return int(self._take(dtype)[0])

    def _take(self, dtype: str, count: int = 1) -> np.ndarray:
        """The next values of the file, on its mapping."""
        size = np.dtype(dtype).itemsize * count
        if size > self._left:
            raise self._error(
                f"{size} bytes are needed and {self._left} are left: the file is cut or damaged; download it again"
            )
        content = self.data[self.at : self.at + size].view(dtype)
        self.at += size
        return content

    @property
    def _left(self) -> int:
        return len(self.data) - self.at

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.where}: {reason}")
