"""A GGUF file as a checkpoint: what the workers read, what a model is detected from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from rayltx.diffusion_models.lightricks.checkpoint import (
    Checkpoint,
    CheckpointReader,
    FileStamp,
    TensorInfo,
    open_checkpoint,
    read_config,
)
from rayltx.expansion.comfyui_gguf.dequantisation import QuantisedTensor, dequantise
from rayltx.expansion.comfyui_gguf.header import MAGIC
from rayltx.expansion.comfyui_gguf.loader import open_ltx_gguf
from rayltx.expansion.comfyui_gguf.quant_types import PLAIN_DTYPES
from rayltx.expansion.comfyui_gguf.reading import GGUFFile, GGUFFileReader
from rayltx.expansion.comfyui_gguf.scales import check_scales
from rayltx.whole_files import check_is_file


@dataclass(frozen=True)
class BlockFormat:
    """How the bytes of a quantised weight become its values."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]  # of the values

    def dequantise(self, data: Tensor, dtype: torch.dtype, compute_dtype: torch.dtype | None = None) -> Tensor:
        """The values, on the device of `data`. Raises as `dequantisation.dequantise`."""
        return dequantise(data, self.type, self.shape, dtype, compute_dtype)


@dataclass(frozen=True)
class QuantisedInfo(TensorInfo):
    """A tensor in blocks. `dtype` and `shape` are of its bytes, as they lie in memory."""

    format: BlockFormat

    @property
    def values_shape(self) -> tuple[int, ...]:
        return self.format.shape

    @property
    def type_name(self) -> str:
        return self.format.type.name


@dataclass(frozen=True)
class GGUFCheckpoint(Checkpoint):
    file: GGUFFile | None = None

    @property
    def quantised(self) -> Mapping[str, BlockFormat]:
        return {name: info.format for name, info in self.tensors.items() if isinstance(info, QuantisedInfo)}

    def check_values(self) -> None:
        assert self.file is not None
        check_scales(self.file, [self.prefix + name for name in self.tensors])

    @contextmanager
    def open(self) -> Iterator[CheckpointReader]:
        assert self.file is not None
        self.check_unchanged()
        with self.file.open() as reader:
            yield _GGUFReader(self, reader)


class _GGUFReader(CheckpointReader):
    """Blocks come as their bytes, unless a dtype is asked for."""

    _file: GGUFFileReader

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        found = self._file.read(self._prefix + name)
        if isinstance(found, QuantisedTensor):
            return found.data if dtype is None else found.dequantise(dtype)
        return found if dtype is None else found.to(dtype)


def open_gguf_checkpoint(path: str | os.PathLike[str]) -> GGUFCheckpoint:
    """Find out what a GGUF file holds, reading its header alone.

    Raises CheckpointError if it is missing, damaged, or not an LTX transformer.
    """
    stamp = FileStamp.of(path) if Path(path).is_file() else None  # where there is none, the reader says so
    file, prefix = open_ltx_gguf(path)
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in file.tensors.items():
        if not name.startswith(prefix):
            continue
        if tensor.is_quantised:
            info: TensorInfo = QuantisedInfo(torch.uint8, tensor.stored_shape, BlockFormat(tensor.type, tensor.shape))
        else:
            info = TensorInfo(PLAIN_DTYPES[tensor.type], tensor.shape)
        tensors[name.removeprefix(prefix)] = info
    # What model detection reads are texts; the rest of a GGUF file's metadata is about itself.
    metadata = {key: value for key, value in file.metadata.items() if isinstance(value, str)}
    config = read_config(Path(file.path), metadata)
    return GGUFCheckpoint(file.path, prefix, tensors, metadata, config, stamp, file)


def open_model_file(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint of either kind. Raises CheckpointError, as the one for its kind does."""
    check_is_file(Path(path))
    with open(path, "rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    if is_gguf or Path(path).suffix.lower() == ".gguf":
        return open_gguf_checkpoint(path)
    return open_checkpoint(path)


def quantised_formats(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The formats of a checkpoint's quantised tensors, by name; {} for a safetensors file."""
    return checkpoint.quantised if isinstance(checkpoint, GGUFCheckpoint) else {}
