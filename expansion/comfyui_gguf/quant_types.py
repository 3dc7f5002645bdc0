"""The element types of a GGUF file: which are plain numbers, and where a quantised block keeps its scales."""

from __future__ import annotations

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_T = GGMLQuantizationType

PLAIN_DTYPES: dict[GGMLQuantizationType, torch.dtype] = {
    _T.F64: torch.float64, _T.F32: torch.float32, _T.F16: torch.float16, _T.BF16: torch.bfloat16,
    _T.I64: torch.int64, _T.I32: torch.int32, _T.I16: torch.int16, _T.I8: torch.int8,
}  # fmt: skip

# Byte offsets within a block of its float16 fields (d, and m or dmin). The types that are missing here keep their scale
# in another form, in which no bit pattern is a NaN or infinite, or are not known well enough.
SCALE_OFFSETS: dict[GGMLQuantizationType, tuple[int, ...]] = {
    _T.Q4_0: (0,), _T.Q4_1: (0, 2), _T.Q5_0: (0,), _T.Q5_1: (0, 2), _T.Q8_0: (0,),
    _T.Q2_K: (80, 82), _T.Q3_K: (108,), _T.Q4_K: (0, 2), _T.Q5_K: (0, 2), _T.Q6_K: (208,),
    _T.IQ4_NL: (0,), _T.IQ4_XS: (0,), _T.IQ1_S: (0,), _T.IQ2_XXS: (0,), _T.IQ2_XS: (0,), _T.IQ2_S: (0,),
    _T.IQ3_XXS: (0,), _T.IQ3_S: (0,), _T.TQ1_0: (52,), _T.TQ2_0: (64,),
}  # fmt: skip


def num_bytes(type: GGMLQuantizationType, num_elements: int) -> int:
    """Bytes that so many elements take; `num_elements` is a multiple of the type's block size."""
    block_size, type_size = GGML_QUANT_SIZES[type]
    assert num_elements % block_size == 0, f"{num_elements} elements are not whole blocks of {block_size}"
    return num_elements // block_size * type_size
