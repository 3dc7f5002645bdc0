"""Are the scales of a file's quantised blocks finite? Without dequantising: at about the speed of reading them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from rayltx.errors import CheckpointError
from rayltx.expansion.comfyui_gguf.header import GGUFTensor
from rayltx.expansion.comfyui_gguf.quant_types import SCALE_OFFSETS
from rayltx.expansion.comfyui_gguf.reading import GGUFFile

# A plain float as an unsigned integer without its sign is above this if it is a NaN.
_INFINITY: dict[GGMLQuantizationType, tuple[type[np.unsignedinteger], int]] = {
    GGMLQuantizationType.F16: (np.uint16, 0x7C00),
    GGMLQuantizationType.BF16: (np.uint16, 0x7F80),
    GGMLQuantizationType.F32: (np.uint32, 0x7F800000),
}
_CHUNK_BYTES = 2**20  # that what is computed stays in the cache


def check_scales(file: GGUFFile, names: Iterable[str] | None = None) -> None:
    """Look at the float16 scales of all blocks of these tensors (None: of all), and at plain floats.

    Raises CheckpointError, by file, tensor and block, for a scale that is a NaN or infinite, and for a plain float16,
    bfloat16 or float32 value that is a NaN.
    """
    with file.open() as reader:
        for name in file.tensors if names is None else names:
            tensor = file.tensors[name]
            reason = _what_is_wrong(tensor, reader.data[tensor.offset : tensor.offset + tensor.num_bytes])
            if reason:
                raise CheckpointError(f"{file.path}: tensor {name} ({tensor.type.name}): {reason}; download it again")


def _what_is_wrong(tensor: GGUFTensor, content: np.ndarray) -> str | None:
    if tensor.type in _INFINITY:
        return _find_nan(content, *_INFINITY[tensor.type])
    offsets = SCALE_OFFSETS.get(tensor.type, ())
    type_size = GGML_QUANT_SIZES[tensor.type][1]
    blocks = content.reshape(-1, type_size)
    step = max(_CHUNK_BYTES // type_size, 1)
    for start in range(0, len(blocks) if offsets else 0, step):
        for offset in offsets:
            scales = blocks[start : start + step, offset : offset + 2].view(np.uint16)[:, 0] & 0x7FFF
            if scales.max() >= 0x7C00:  # all bits of the exponent: infinite, or a NaN
                block = start + int(scales.argmax())
                value = blocks[block, offset : offset + 2].view(np.float16)[0]
                return f"the scale at byte {offset} of block {block} is {value}"
    return None


def _find_nan(content: np.ndarray, unsigned: type[np.unsignedinteger], infinity: int) -> str | None:
    values = content.view(unsigned)
    without_sign = unsigned(np.iinfo(unsigned).max >> 1)
    step = _CHUNK_BYTES // values.itemsize
    for start in range(0, len(values), step):
        magnitudes = values[start : start + step] & without_sign
        if magnitudes.max() > infinity:
            return f"value {start + int((magnitudes > infinity).argmax())} is a NaN"
    return None
