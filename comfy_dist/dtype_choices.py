"""The dtypes that loaders offer, by the names that their nodes show. Needs no torch: nodes list them."""

from __future__ import annotations

# Of the weights in memory: torch's name for it, or None for ComfyUI's own choice. The first four are its UNETLoader's.
WEIGHT_DTYPES = {
    "default": None,
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e4m3fn_fast": "float8_e4m3fn",  # and computed with in fp8
    "fp8_e5m2": "float8_e5m2",
    "bf16": "bfloat16",
    "fp16": "float16",
}
FAST_FP8 = "fp8_e4m3fn_fast"

# In what blocks of a GGUF file become numbers, and their patches are computed; target: what the layer computes in.
GGUF_DTYPES = ("default", "target", "float32", "float16", "bfloat16")
