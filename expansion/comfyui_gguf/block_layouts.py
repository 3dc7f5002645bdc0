"""How each quantised type packs a block: its integers, and its scales.

Integers are taken apart 8 bytes at a time: in a 64-bit word, one shift and one mask unpack 8 of them, which costs an
eighth of doing it by element. Scales are computed for all blocks at once, as there are few.

Source: the block structures of ggml (`ggml-common.h`), as `gguf.quants` reads them.
"""

# N blocks, S parts of a block with their own scale, W elements in a part

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType
from torch import Tensor


@dataclass(frozen=True)
class BlockLayout:
    """A block of `parts` x `width` values, `scale * quant + minimum`.

    quants: blocks (N, bytes) uint8 to (N, S * W) int8 or uint8, in the order of the values; may be a view on them.
    scales: blocks (N, bytes) uint8 and a floating dtype to scale and minimum (None: zero), both (N, S) of it.
    """

    parts: int
    width: int
    quants: Callable[[Tensor], Tensor]
    scales: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor | None]]


def _fields(packed: Tensor, bits: int, width: int, at: int = 0) -> Tensor:
    """Integers of so many bits out of bytes: the lowest of `width` bytes first, then the next lowest, and so on.

    packed: (N, a multiple of `width`) uint8, width a multiple of 4. Returns (N, packed.shape[1] * 8 / bits) bytes, each
    integer `at` bits from the bottom of its byte, as words: int64, or int32 where 8 does not divide `width`.
    """
    word = torch.int32 if width % 8 else torch.int64
    words = _bytes_of(packed).view(word).view(-1, 1, width // word.itemsize)
    mask = _repeated((1 << bits) - 1, word)  # what a shift moves into a byte from its neighbour is outside of it
    if bits == 4:
        fields = words.new_empty((len(words), 2, words.shape[2]))
        torch.bitwise_and(words, mask, out=fields[:, :1])
        torch.bitwise_and(words >> 4, mask, out=fields[:, 1:])
    else:  # many fields: one operation on short rows is faster than two for each field
        fields = (words >> _shifts(bits, word, packed.device)).bitwise_and_(mask)
    if at:
        fields <<= at
    return fields.view(packed.shape[0], -1)


def _bytes_of(packed: Tensor) -> Tensor:
    """A copy of a part of every block, contiguous and at the beginning of its storage, as a view as words needs it."""
    return packed.view(torch.int16).clone(memory_format=torch.contiguous_format)


@functools.cache
def _shifts(bits: int, word: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=word, device=device).view(-1, 1)


def _spread_bits(packed: Tensor, at: int) -> Tensor:
    """Bit i of (N, B) uint8, from the lowest of the first byte on, to byte i of (N, B) int64, there at bit `at`."""
    return _spread_bytes(at, packed.device).index_select(0, packed.reshape(-1).to(torch.int32)).view(len(packed), -1)


@functools.cache
def _spread_bytes(at: int, device: torch.device) -> Tensor:
    """(256,) int64: the 8 bits of every byte, each in a byte of its own."""
    every = torch.arange(256, device="cpu")  # not where a torch.device context would put it
    bits = (every.view(-1, 1) >> every[:8]) & 1
    return (bits << at).to(torch.uint8).view(torch.int64).view(-1).to(device)


def _repeated(byte: int, word: torch.dtype = torch.int64) -> int:
    return int.from_bytes(bytes([byte]) * word.itemsize, "little", signed=True)


def _half(blocks: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """(N, 1): the float16 at a byte offset of every block."""
    return blocks[:, offset : offset + 2].view(torch.float16).to(dtype)


def _less(words: Tensor, zero: int) -> Tensor:
    """Bytes below 128, less `zero`, as int8, in place. Adding from below 128 never carries into the next byte."""
    words += _repeated(0x80 - zero, words.dtype)
    words ^= _repeated(0x80, words.dtype)
    return words.view(torch.int8)


# --- blocks of 32 with one scale ---------------------------------------------------------------------------------


def _scale(offset: int = 0) -> Callable[[Tensor, torch.dtype], tuple[Tensor, None]]:
    return lambda blocks, dtype: (_half(blocks, offset, dtype), None)


def _scale_and_minimum(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _half(blocks, 0, dtype), _half(blocks, 2, dtype)


def _q5(blocks: Tensor, offset: int) -> Tensor:
    """0 to 31, as words."""
    quants = _fields(blocks[:, offset + 4 :], bits=4, width=16)
    return quants.bitwise_or_(_spread_bits(blocks[:, offset : offset + 4], at=4))


# --- blocks of 256 -----------------------------------------------------------------------------------------------


def _k_scales(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes, the upper 2 bits of the later 4 apart."""
    low, middle, high = _bytes_of(blocks[:, 4:16]).view(torch.int32).unbind(1)
    four, two, six = (_repeated(byte, torch.int32) for byte in (0x0F, 0x30, 0x3F))
    scale = torch.stack((low & six, (high & four) | ((low >> 2) & two)), dim=1).view(torch.uint8)
    minimum = torch.stack((middle & six, ((high >> 4) & four) | ((middle >> 2) & two)), dim=1).view(torch.uint8)
    return _half(blocks, 0, dtype) * scale.to(dtype), -_half(blocks, 2, dtype) * minimum.to(dtype)


def _q2_k_scales(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    packed = blocks[:, :16]
    return _half(blocks, 80, dtype) * (packed & 15).to(dtype), -_half(blocks, 82, dtype) * (packed >> 4).to(dtype)


def _q3_k(blocks: Tensor) -> Tensor:
    # The upper bit says that 4 is *not* to be taken off.
    quants = _fields(blocks[:, 32:96], bits=2, width=32)
    return _less(quants.bitwise_or_(_fields(blocks[:, :32], bits=1, width=32, at=2)), 4)


def _q3_k_scales(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, None]:
    scales = _fields(blocks[:, 96:104], bits=4, width=8)
    scales |= _fields(blocks[:, 104:108], bits=2, width=4, at=4).view(torch.int64)
    return _half(blocks, 108, dtype) * _less(scales, 32).to(dtype), None


def _q5_k(blocks: Tensor) -> Tensor:
    quants = _fields(blocks[:, 48:], bits=4, width=32)
    return quants.bitwise_or_(_fields(blocks[:, 16:48], bits=1, width=32, at=4)).view(torch.uint8)


def _q6_k(blocks: Tensor) -> Tensor:
    quants = _fields(blocks[:, :128], bits=4, width=64)
    return _less(quants.bitwise_or_(_fields(blocks[:, 128:192], bits=2, width=32, at=4)), 32)


def _q6_k_scales(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, None]:
    return _half(blocks, 208, dtype) * blocks[:, 192:208].view(torch.int8).to(dtype), None


# --- 4 bits that stand for 16 unequal steps ----------------------------------------------------------------------

_IQ4_STEPS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@functools.cache
def _iq4_pairs(device: torch.device) -> Tensor:
    """Two steps as int16 by two indices as int16: half the look-ups, in a table that stays in the first-level cache."""
    steps = torch.tensor(_IQ4_STEPS, dtype=torch.int8, device="cpu")
    pairs = torch.zeros(0x1000, 2, dtype=torch.int8, device="cpu")
    for high in range(16):
        pairs[high * 256 : high * 256 + 16, 0] = steps
        pairs[high * 256 : high * 256 + 16, 1] = steps[high]
    return pairs.view(torch.int16).view(-1).to(device)


def _iq4(blocks: Tensor, offset: int) -> Tensor:
    pairs = _fields(blocks[:, offset:], bits=4, width=16).view(torch.int16).view(-1)
    steps = torch.empty_like(pairs)
    portion = len(pairs) if pairs.is_cuda else 2**15  # with more, torch would hand it to several threads
    for indices, result in zip(pairs.split(portion), steps.split(portion)):
        torch.index_select(_iq4_pairs(blocks.device), 0, indices.to(torch.int32), out=result)
    return steps.view(torch.int8)


def _iq4_xs_scales(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, None]:
    """8 scales of 6 bits: the lower 4 of two in a byte, the upper 2 of four in a byte."""
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=-1)
    high = torch.stack([(blocks[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
    scales = low.view(-1, 8) | high.view(-1, 8) << 4
    return _half(blocks, 0, dtype) * (scales.view(torch.int8) - 32).to(dtype), None


LAYOUTS: dict[GGMLQuantizationType, BlockLayout] = {
    GGMLQuantizationType.Q4_0: BlockLayout(1, 32, lambda b: _less(_fields(b[:, 2:], 4, 16), 8), _scale()),
    GGMLQuantizationType.Q4_1: BlockLayout(
        1, 32, lambda b: _fields(b[:, 4:], 4, 16).view(torch.uint8), _scale_and_minimum
    ),
    GGMLQuantizationType.Q5_0: BlockLayout(1, 32, lambda b: _less(_q5(b, 2), 16), _scale()),
    GGMLQuantizationType.Q5_1: BlockLayout(1, 32, lambda b: _q5(b, 4).view(torch.uint8), _scale_and_minimum),
    GGMLQuantizationType.Q8_0: BlockLayout(1, 32, lambda b: b[:, 2:].view(torch.int8), _scale()),
    GGMLQuantizationType.Q2_K: BlockLayout(
        16, 16, lambda b: _fields(b[:, 16:80], 2, 32).view(torch.uint8), _q2_k_scales
    ),
    GGMLQuantizationType.Q3_K: BlockLayout(16, 16, _q3_k, _q3_k_scales),
    GGMLQuantizationType.Q4_K: BlockLayout(8, 32, lambda b: _fields(b[:, 16:], 4, 32).view(torch.uint8), _k_scales),
    GGMLQuantizationType.Q5_K: BlockLayout(8, 32, _q5_k, _k_scales),
    GGMLQuantizationType.Q6_K: BlockLayout(16, 16, _q6_k, _q6_k_scales),
    GGMLQuantizationType.IQ4_NL: BlockLayout(1, 32, lambda b: _iq4(b, 2), _scale()),
    GGMLQuantizationType.IQ4_XS: BlockLayout(8, 32, lambda b: _iq4(b, 8), _iq4_xs_scales),
}
