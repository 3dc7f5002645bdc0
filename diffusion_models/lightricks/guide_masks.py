"""ComfyUI's masks of video self-attention, of guide frames with a strength, in the exchange's terms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rayltx.sequence_parallel.masks import DenseMask, GroupedMask, SelfAttentionMask


def self_attention_mask_of(mask: Any) -> SelfAttentionMask | None:
    """Take over the mask that ComfyUI hands to a block's video self-attention.

    mask: None; a dense additive mask (1, 1, N, N), which ComfyUI had up to 0.20; or the GuideAttentionMask that it has
    had since, with one row for all tokens before the guides, a row for each token of a guide with a strength, and none
    for what follows. Raises TypeError for anything else.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        return DenseMask(mask if mask.ndim == 4 else mask[(None,) * (4 - mask.ndim)])
    if all(hasattr(mask, name) for name in ("guide_start", "tracked_count", "noisy_mask", "tracked_mask")):
        rest = mask.noisy_mask.shape[-1] - mask.guide_start - mask.tracked_count
        return GroupedMask(((mask.guide_start, mask.noisy_mask), (mask.tracked_count, mask.tracked_mask), (rest, None)))
    raise TypeError(f"a self-attention mask of type {type(mask).__name__}, which is not known here")
