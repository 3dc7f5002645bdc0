"""Conversion between safetensors and GGUF, one tensor in memory at a time.

Which weights are quantised follows the converters in use: matrices of layers, whose rows are whole blocks. Biases,
norms, `scale_shift_table`s and small tensors stay as they are. Every metadata string goes along, the `config` above all.
Source: the conversion tool of ComfyUI-GGUF, for what is kept and for `comfy.gguf.orig_shape`.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from safetensors import SafetensorError
from torch import Tensor

from rayltx.diffusion_models.lightricks.checkpoint import find_prefix, transformer_prefix
from rayltx.diffusion_models.lightricks.safetensors_files import (
    SAFETENSORS_DTYPES,
    SAFETENSORS_NAMES,
    damage_of,
    open_safetensors,
)
from rayltx.errors import CheckpointError, InputError, UnsupportedError
from rayltx.expansion.comfyui_gguf.dequantisation import QuantisedTensor
from rayltx.expansion.comfyui_gguf.quant_types import PLAIN_DTYPES, num_bytes
from rayltx.expansion.comfyui_gguf.reading import ORIGINAL_SHAPE, GGUFFile, open_gguf
from rayltx.whole_files import appearing_whole, check_is_file

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]  # tensors done, tensors, the name of the one that is next or ""

_FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ARCHITECTURE = "ltxv"
_SMALL = 1024  # elements; below, a quantised tensor saves nothing
_MOST_DIMS = 4  # of a tensor in a GGUF file
_SCALED_FP8_MARKS = ("scaled_fp8", "scale_weight", "weight_scale", "comfy_quant")
# What describes the GGUF file itself and not the model: written anew, never carried over.
_OF_THE_FILE = ("general.architecture", "general.alignment", "general.quantization_version", "general.file_type")

_PLAIN_TYPES = {dtype: type for type, dtype in PLAIN_DTYPES.items()}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `target`, a .gguf or a .safetensors file, from `source`, the other one.

    type: of the matrices in a GGUF file (`quantisable_types()`; F32 is applied to every float), or the dtype of the
    safetensors file (float32, float16, bfloat16). Without it nothing is rounded: plain tensors keep their dtype, blocks
    become float32. `target` appears when it is whole, or not at all.
    Raises InputError for what cannot be asked, CheckpointError for a source that is damaged or not an LTX transformer,
    UnsupportedError for a tensor that a GGUF file cannot hold.
    """
    source, target = Path(source), Path(target)
    kinds = (source.suffix.lower(), target.suffix.lower())
    if source.exists() and target.exists() and source.samefile(target):
        raise InputError(f"{target}: source and target are the same file; give the target another name")
    if kinds == (".safetensors", ".gguf"):
        _to_gguf(source, target, _quantisable_type(type), progress)
    elif kinds == (".gguf", ".safetensors"):
        if type is not None and type not in _FLOAT_DTYPES:
            raise InputError(f"type={type} must be one of {', '.join(_FLOAT_DTYPES)}, for a .safetensors file")
        _to_safetensors(open_gguf(source), target, _FLOAT_DTYPES.get(type or ""), progress)
    else:
        raise InputError(
            f"{source.name} to {target.name}: one must be a .gguf file and the other a .safetensors file, by their endings"
        )


@functools.cache
def quantisable_types() -> dict[str, GGMLQuantizationType]:
    """What the installed gguf package can write, by name: it reads more types than that."""
    found = {}
    for type in GGMLQuantizationType:
        try:
            gguf.quants.quantize(np.zeros((1, GGML_QUANT_SIZES[type][0]), np.float32), type)
        except NotImplementedError:
            continue
        found[type.name] = type
    return found


def _quantisable_type(name: str | None) -> GGMLQuantizationType | None:
    if name is None:
        return None
    if name.upper() not in quantisable_types():
        raise InputError(
            f"type={name} must be one of {', '.join(quantisable_types())}, which the gguf package can write"
        )
    return quantisable_types()[name.upper()]


# --- safetensors to GGUF -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What becomes of one tensor. `stored` is its shape in the file, of at most four dimensions."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    stored: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.type, math.prod(self.shape))


def _to_gguf(source: Path, target: Path, type: GGMLQuantizationType | None, progress: Progress | None) -> None:
    check_is_file(source)
    try:
        with open_safetensors(source) as file:
            described = file.described()
            names = list(described)
            prefix = transformer_prefix(source, names)
            _say_what_is_left_out(source, names, prefix)
            plans = [
                _plan(source, name.removeprefix(prefix), *described[name], type)
                for name in names
                if name.startswith(prefix)
            ]
            with appearing_whole(target) as temporary:
                writer = _start_writer(temporary, file.metadata(), plans)
                try:
                    for number, plan in enumerate(plans):
                        _report(progress, number, len(plans), plan.name)
                        writer.write_tensor_data(_encode(file.read(prefix + plan.name), plan))
                finally:
                    writer.close()
                open_gguf(temporary)
    except SafetensorError as error:
        raise CheckpointError(f"{source}: {damage_of(error)}") from error
    _report(progress, len(plans), len(plans), "")


def _say_what_is_left_out(source: Path, names: list[str], prefix: str) -> None:
    others = [name for name in names if not name.startswith(prefix)]
    if others:
        logger.warning(
            "%s: a GGUF file holds the transformer alone; %d other tensors (%s, ...) are left out",
            source, len(others), others[0],
        )  # fmt: skip


def _plan(source: Path, name: str, dtype: str, shape: tuple[int, ...], type: GGMLQuantizationType | None) -> _Plan:
    if any(mark in name for mark in _SCALED_FP8_MARKS):
        raise UnsupportedError(f"{source}: tensor {name}: scaled 8-bit weights; convert the bfloat16 file of the model")
    kept = _kept_type(source, name, dtype)
    is_float = kept.name.startswith(("F", "BF"))
    # Only of layers: a bare parameter, such as a scale_shift_table, is used without a layer that would dequantise it.
    is_layer = name.endswith(".weight") and "norm" not in name
    is_matrix = is_layer and len(shape) >= 2 and math.prod(shape) >= _SMALL
    if type is None or not is_float:
        chosen = kept
    elif type == GGMLQuantizationType.F32 or (is_matrix and shape[-1] % GGML_QUANT_SIZES[type][0] == 0):
        chosen = type
    else:
        chosen = kept
    if not shape and is_float:
        chosen = GGMLQuantizationType.F32  # the gguf package cannot read another float type without dimensions
    stored = shape if len(shape) <= _MOST_DIMS else (math.prod(shape[:-1]), shape[-1])
    return _Plan(name, chosen, shape, stored)


def _kept_type(source: Path, name: str, dtype: str) -> GGMLQuantizationType:
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return GGMLQuantizationType.F16  # holds every value of both
    known = SAFETENSORS_DTYPES.get(dtype)
    if known not in _PLAIN_TYPES:
        raise UnsupportedError(
            f"{source}: tensor {name}: a GGUF file cannot hold the dtype {dtype}; convert another file"
        )
    return _PLAIN_TYPES[known]


def _start_writer(path: Path, metadata: Mapping[str, str], plans: list[_Plan]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        if key not in _OF_THE_FILE and not key.startswith(ORIGINAL_SHAPE):
            writer.add_key_value(key, value, GGUFValueType.STRING)  # add_string leaves out what is empty
    for plan in plans:
        if plan.stored != plan.shape:
            writer.add_array(ORIGINAL_SHAPE + plan.name, plan.shape)
        writer.add_tensor_info(plan.name, plan.stored, np.dtype(np.float32), plan.num_bytes, raw_dtype=plan.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _encode(tensor: Tensor, plan: _Plan) -> np.ndarray:
    """The bytes that are written, as an array of any dtype."""
    tensor = tensor.reshape(plan.stored).contiguous()
    if plan.type in PLAIN_DTYPES:
        plain = tensor.to(PLAIN_DTYPES[plan.type]).reshape(-1)
        if plan.type == GGMLQuantizationType.F16 and plain.isinf().any() and not tensor.isinf().any():
            raise UnsupportedError(
                f"tensor {plan.name}: its largest value, {tensor.abs().max():g}, exceeds F16; use BF16"
            )
        return plain.view(torch.uint8).numpy()
    # What a block cannot represent warns here and is found by `check_scales` in the result.
    with np.errstate(invalid="ignore", over="ignore"):
        return gguf.quants.quantize(tensor.to(torch.float32).numpy(), plan.type)


# --- GGUF to safetensors -----------------------------------------------------------------------------------------


def _to_safetensors(file: GGUFFile, target: Path, dtype: torch.dtype | None, progress: Progress | None) -> None:
    prefix = find_prefix(file.tensors)
    dtypes = {}
    for name, tensor in file.tensors.items():
        exact = PLAIN_DTYPES.get(tensor.type, torch.float32)
        dtypes[name] = dtype if dtype is not None and exact.is_floating_point else exact
    # Wide elements first: every tensor then begins at a multiple of its element's size.
    names = sorted(file.tensors, key=lambda name: -dtypes[name].itemsize)
    header: dict[str, Any] = {"__metadata__": _strings(file.metadata)}
    at = 0
    for name in names:
        end = at + file.tensors[name].num_elements * dtypes[name].itemsize
        header[name.removeprefix(prefix)] = {
            "dtype": SAFETENSORS_NAMES[dtypes[name]],
            "shape": list(file.tensors[name].shape),
            "data_offsets": [at, end],
        }
        at = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with appearing_whole(target) as temporary, file.open() as reader, temporary.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for number, name in enumerate(names):
            _report(progress, number, len(names), name)
            stored = reader.read(name)
            values = stored.dequantise(dtypes[name]) if isinstance(stored, QuantisedTensor) else stored.to(dtypes[name])
            out.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    _report(progress, len(names), len(names), "")


def _strings(metadata: Mapping[str, Any]) -> dict[str, str]:
    """safetensors metadata is text: numbers as Python writes them, lists as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value) if isinstance(value, list) else str(value)
        for key, value in metadata.items()
        if not key.startswith(ORIGINAL_SHAPE) and key != "general.alignment"
    }


# --- both --------------------------------------------------------------------------------------------------------


def _report(progress: Progress | None, done: int, total: int, name: str) -> None:
    if progress is not None:
        progress(done, total, name)
