"""Quantised blocks to floating point, in torch, on the device where the blocks are.

A value is `scale * quant`, or `scale * quant + minimum`: `quant` a small integer of its own, `scale` and `minimum`
shared by a block or part of one. `block_layouts` unpacks the integers and the scales; here they are put together.
In float32 the result is that of `gguf.quants.dequantize`, bit for bit: the same operations, each rounded once.
"""

# N blocks, S parts of a block with their own scale, W elements in a part

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from rayltx.errors import InputError, UnsupportedError
from rayltx.expansion.comfyui_gguf.block_layouts import LAYOUTS, BlockLayout
from rayltx.expansion.comfyui_gguf.quant_types import PLAIN_DTYPES

logger = logging.getLogger(__name__)

# Elements at a time. On a CPU what is between stays in the second-level cache. Where torch has several threads, it would
# hand an operation on more than 2**15 elements to them: as short as these are, the threads would mostly wait for each
# other, and for milliseconds where a core is busy with something else. (Integers count an eighth: 8 are in a word.)
# A GPU wants few launches; there the bound is for memory.
_UNPACKED, _VALUES_OF_ONE_THREAD, _VALUES_OF_MORE = 2**17, 2**17, 2**15
_ON_GPU = 2**25
_HUGE_PAGE_BYTES = 2**22  # from which on numpy asks for them


@dataclass(frozen=True)
class QuantisedTensor:
    """Blocks as a file stores them. data: contiguous uint8 of any shape; shape: of the values."""

    data: Tensor
    type: GGMLQuantizationType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _check(self.data, self.type, self.shape)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def dequantise(self, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None) -> Tensor:
        return dequantise(self.data, self.type, self.shape, dtype, compute_dtype)


def dequantise(
    data: Tensor,
    type: GGMLQuantizationType,
    shape: Sequence[int],
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The values of quantised blocks.

    data: contiguous uint8 of any shape, as the file stores it. Returns `shape`, `dtype`, on the device of `data`; for
    a plain type of that dtype a view on `data`. Values are computed in `compute_dtype` (float32 unless given) and
    rounded once to `dtype`. On a GPU nothing waits for the device, except for types that only the gguf package knows:
    those take its CPU code, and are logged once each.
    Raises InputError if `data` has not the bytes that `shape` takes, UnsupportedError for a type that nothing decodes.
    """
    _check(data, type, shape)
    if data.storage_offset() % 8:
        data = data.clone()  # it is viewed as wider words, which torch does at multiples of their size alone
    if type in PLAIN_DTYPES:
        return data.reshape(-1).view(PLAIN_DTYPES[type]).view(tuple(shape)).to(dtype)
    layout = LAYOUTS.get(type)
    if layout is None:
        return _dequantise_by_gguf(data, type, shape).to(dtype)
    blocks = data.reshape(-1, GGML_QUANT_SIZES[type][1])
    return _dequantise_blocks(blocks, layout, dtype, compute_dtype or torch.float32).view(tuple(shape))


def _dequantise_blocks(blocks: Tensor, layout: BlockLayout, dtype: torch.dtype, compute_dtype: torch.dtype) -> Tensor:
    """(N, bytes of a block) uint8 to (N, S, W)."""
    result = _empty((len(blocks), layout.parts, layout.width), dtype, blocks.device)
    if len(blocks) == 0:
        return result
    at_once = _blocks_at_once(blocks.device, layout)
    room = torch.empty_like(result[: at_once.values], dtype=compute_dtype) if compute_dtype != dtype else None
    for scaled, result_scaled in zip(blocks.split(at_once.scales), result.split(at_once.scales)):
        scale, minimum = layout.scales(scaled, compute_dtype)
        quants = (
            quants
            for packed in scaled.split(at_once.quants)
            for quants in layout.quants(packed).view(-1, layout.parts, layout.width).split(at_once.values)
        )
        scales = scale.unsqueeze(-1).split(at_once.values)
        minima = repeat(None) if minimum is None else minimum.unsqueeze(-1).split(at_once.values)
        for target, integers, factor, addend in zip(result_scaled.split(at_once.values), quants, scales, minima):
            values = target if room is None else room[: len(target)]
            values.copy_(integers)
            values.mul_(factor)
            if addend is not None:
                values.add_(addend)
            if room is not None:
                target.copy_(values)
    return result


@dataclass(frozen=True)
class _BlocksAtOnce:
    """How many blocks each step takes; each number is a multiple of the next."""

    scales: int
    quants: int
    values: int


def _blocks_at_once(device: torch.device, layout: BlockLayout) -> _BlocksAtOnce:
    size = layout.parts * layout.width
    if device.type != "cpu":
        return _BlocksAtOnce(_ON_GPU // size, _ON_GPU // size, _ON_GPU // size)
    values = _VALUES_OF_ONE_THREAD if torch.get_num_threads() == 1 else _VALUES_OF_MORE
    return _BlocksAtOnce(_VALUES_OF_MORE // (2 * layout.parts), _UNPACKED // size, values // size)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < _HUGE_PAGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    # numpy asks the kernel for huge pages, torch does not: most of the time would go to a first write to small ones.
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def _dequantise_by_gguf(data: Tensor, type: GGMLQuantizationType, shape: Sequence[int]) -> Tensor:
    block_size, type_size = GGML_QUANT_SIZES[type]
    # The package works on 16 rows at a time; without rows, on everything at once.
    blocks_in_row = shape[-1] // block_size if shape[-1] % block_size == 0 else 1
    rows = data.cpu().numpy().reshape(-1, max(blocks_in_row, 1) * type_size)
    try:
        values = gguf.quants.dequantize(rows, type)
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{type.name}: nothing decodes this type; use a file of another, such as Q8_0"
        ) from error
    _log_slow_type(type)
    return torch.from_numpy(values).to(data.device).view(tuple(shape))


@functools.cache
def _log_slow_type(type: GGMLQuantizationType) -> None:
    logger.warning(
        "%s weights are dequantised by the gguf package on the CPU, which is slow; Q4_K, Q5_K, Q6_K and Q8_0 are not",
        type.name,
    )


def _check(data: Tensor, type: GGMLQuantizationType, shape: Sequence[int]) -> None:
    block_size, type_size = GGML_QUANT_SIZES[type]
    num_elements = math.prod(shape)
    if data.dtype != torch.uint8 or data.numel() * block_size != num_elements * type_size:
        raise InputError(
            f"{data.numel()} elements of {data.dtype} are not a {type.name} tensor of shape {tuple(shape)}: "
            f"{num_elements} values in blocks of {block_size} take {num_elements / block_size * type_size:g} bytes (uint8)"
        )
