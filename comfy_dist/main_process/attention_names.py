"""The attention names of Raylight's graphs, and the kernel of ComfyUI that each means here."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping

from rayltx.errors import InputError

logger = logging.getLogger(__name__)

TORCH, FLASH, SAGE = "torch", "flash", "sage"
_FAMILIES = {
    "TORCH": TORCH, "TORCH_FLASH": TORCH, "TORCH_EFFICIENT": TORCH, "TORCH_MATH": TORCH, "TORCH_CUDNN": TORCH,
    "FA": FLASH, "FLASH_ATTN": FLASH, "FA3": FLASH, "FLASH_ATTN_3": FLASH,
    "SAGE_AUTO_DETECT": SAGE, "SAGE_FP16_TRITON": SAGE, "SAGE_FP16_CUDA": SAGE, "SAGE_FP8_CUDA": SAGE,
    "SAGE_FP8_SM90": SAGE, "AITER": "aiter", "AITER_ROCM": "aiter",
}  # fmt: skip
NAMES = tuple(_FAMILIES)
_PACKAGES = {FLASH: "flash_attn", SAGE: "sageattention"}
# ComfyUI's own arguments for its attention kernels: at most one of them is set.
_ARGUMENTS = {TORCH: "use_pytorch_cross_attention", FLASH: "use_flash_attention", SAGE: "use_sage_attention"}
_OTHERS = ("use_split_cross_attention", "use_quad_cross_attention")


def chooses_other_kernel(kernel_arguments: Mapping[str, object]) -> bool:
    """Whether attention is not torch's own, where a rank sees all keys: merged parts are torch's in any case."""
    return any(kernel_arguments.get(_ARGUMENTS[family]) for family in (FLASH, SAGE))


def warn_if_ring_replaces(kernel_arguments: Mapping[str, object], ring_degree: int) -> None:
    """Say by name that ring attention cannot use a kernel: its partial results are merged by a log-sum-exp of torch's.

    kernel_arguments: of the workers' ComfyUI, among others.
    """
    chosen = [family for family in (FLASH, SAGE) if kernel_arguments.get(_ARGUMENTS[family])]
    if ring_degree > 1 and chosen:
        logger.warning(
            "ring_degree=%d: the ring computes video self-attention with torch's own kernels, not with %s, which gives no "
            "log-sum-exp that could be merged; for that kernel, give all GPUs to ulysses_degree",
            ring_degree,
            _PACKAGES[chosen[0]],
        )


def attention_arguments(name: str) -> dict[str, bool]:
    """ComfyUI's arguments that choose the kernel in the workers.

    torch chooses among its own kernels by itself. What is not installed, or has no kernel in ComfyUI, falls back to
    torch's, with a warning. Raises InputError for a name that was never one.
    """
    if name not in _FAMILIES:
        raise InputError(f"XFuser_attention={name!r} must be one of {', '.join(NAMES)}")
    family = _FAMILIES[name]
    if family not in _ARGUMENTS:
        logger.warning("XFuser_attention=%s: ComfyUI has no such kernel; using torch's attention", name)
        family = TORCH
    elif family in _PACKAGES and importlib.util.find_spec(_PACKAGES[family]) is None:
        logger.warning(
            "XFuser_attention=%s needs the package %s, which is not installed; using torch's attention",
            name,
            _PACKAGES[family],
        )
        family = TORCH
    return {
        **{argument: kernel == family for kernel, argument in _ARGUMENTS.items()},
        **dict.fromkeys(_OTHERS, False),
    }
