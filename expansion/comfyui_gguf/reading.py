"""GGUF files: what one holds, found from its header alone, and its tensors on a mapping of the file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor

from rayltx.errors import CheckpointError
from rayltx.expansion.comfyui_gguf.dequantisation import QuantisedTensor
from rayltx.expansion.comfyui_gguf.header import GGUFTensor, Header, read_header
from rayltx.expansion.comfyui_gguf.quant_types import PLAIN_DTYPES

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # and a tensor's name: its shape, where the file could not hold it


@dataclass(frozen=True)
class GGUFFile:
    """`tensors` is by the file's own names, in its order."""

    path: str
    architecture: str | None
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @contextmanager
    def open(self) -> Iterator[GGUFFileReader]:
        """Read tensors: `with file.open() as reader: reader.read(name)`."""
        yield GGUFFileReader(self)


class GGUFFileReader:
    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        try:
            self.data = np.memmap(file.path, dtype=np.uint8, mode="c")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file.path}: it cannot be mapped ({error}); was it moved or replaced?") from error

    def read_bytes(self, name: str) -> Tensor:
        """Flat uint8, as stored, on a private, copy-on-write mapping that lives as long as any tensor on it."""
        tensor = self._file.tensors[name]
        content = self.data[tensor.offset : tensor.offset + tensor.num_bytes]
        if len(content) != tensor.num_bytes:
            raise CheckpointError(f"{self._file.path}: tensor {name}: the file has become shorter since it was opened")
        return torch.from_numpy(content)

    def read(self, name: str) -> Tensor | QuantisedTensor:
        """A plain tensor in its dtype and shape, or the blocks of a quantised one. Nothing is read before it is used."""
        tensor, content = self._file.tensors[name], self.read_bytes(name)
        if tensor.num_bytes == 0:
            content = torch.empty(0, dtype=torch.uint8)  # torch gives an empty array strides that cannot be viewed
        if tensor.is_quantised:
            return QuantisedTensor(content.view(tensor.stored_shape), tensor.type, tensor.shape)
        return content.view(PLAIN_DTYPES[tensor.type]).view(tensor.shape)


def get_gguf_metadata(reader: GGUFReader | Header) -> dict[str, Any]:
    """Every field of a file by its key: int, float, bool, str, or a list of them (nested arrays come flattened).

    Decoded by `ReaderField.contents()`; taking a value out of `ReaderField.parts` by hand fails with numpy >= 2.4,
    which no longer turns an array of one element into a number. A reader's own counts (`GGUF.*`) are left out.
    """
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Find out what a file holds, reading its header alone.

    Raises CheckpointError, by file, tensor and reason, if it is missing, no GGUF, or damaged.
    """
    path = Path(path).resolve()
    header = read_header(path)
    try:
        metadata = get_gguf_metadata(header)
    except ValueError as error:  # arrays of several types in one array
        raise CheckpointError(f"{path}: the gguf package cannot read it ({type(error).__name__}: {error})") from error
    tensors = {}
    for name, tensor in header.tensors.items():
        original = metadata.get(ORIGINAL_SHAPE + name)
        if original is not None:
            tensor = replace(tensor, shape=_original_shape(path, name, original, tensor.shape))
        tensors[name] = tensor
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str | None):
        raise CheckpointError(f"{path}: general.architecture is {architecture!r}, which is not a text")
    return GGUFFile(str(path), architecture, metadata, tensors)


def _original_shape(path: Path, name: str, original: Any, stored: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(original, list) or not all(isinstance(size, int) and size >= 0 for size in original):
        raise CheckpointError(
            f"{path}: tensor {name}: its {ORIGINAL_SHAPE} metadata is {original!r}, not a list of sizes"
        )
    if math.prod(original) != math.prod(stored):
        raise CheckpointError(
            f"{path}: tensor {name}: its {ORIGINAL_SHAPE} metadata says {original}, which is {math.prod(original)} "
            f"elements; the file holds {stored}, which is {math.prod(stored)}"
        )
    return tuple(original)


def read_tensor(file: GGUFFile, name: str) -> Tensor | QuantisedTensor:
    """One tensor; for many, `file.open()` maps the file once."""
    with file.open() as reader:
        return reader.read(name)
