"""Attention on one device that also returns the log-sum-exp of its scores.

torch's public `scaled_dot_product_attention` does not return it, its kernels do. For attention that is never merged
with another part, hosts hand in their own kernel instead (`Attend`).

Letters in shapes: B batch, T query tokens, S key tokens, H heads, E head width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(query (B, T, H, E), key (B, S, H, E), value (B, S, H, E), additive mask or None) -> (B, T, H, E)."""

AttendWithLse = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""As Attend, returning the log-sum-exp of the scaled and masked scores too: (B, H, T), float32 or wider."""

_MATH_CHUNK_SCORES = 1 << 26  # scores held at once by the plain formula: 256 MB in float32


def torch_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` in this package's layout. An Attend."""
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Exact attention and its log-sum-exp, by the fastest kernel that gives both.

    mask: None, or additive (any float dtype) or boolean (True: visible), broadcastable to (B, H, T, S).
    Returns out (B, T, H, E) of the query's dtype, and lse (B, H, T), float32 (float64 for float64); -inf, with a row
    of zeros in out, for queries that see no key.
    """
    B, T, H, E = query.shape
    S = key.shape[1]
    if 0 in (B, T, H, S):  # the CPU kernel divides by these sizes and takes the process down
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return torch.zeros_like(query), query.new_full((B, H, T), -torch.inf, dtype=lse_dtype)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if mask is not None:
        mask = _additive(mask, q.dtype)
        while mask.ndim < 4:
            mask = mask.unsqueeze(0)
    if query.device.type == "cpu":
        out, lse = _cpu_attention(q, k, v, mask)
    elif query.device.type == "cuda":
        out, lse = _cuda_attention(q, k, v, mask)
    else:
        out, lse = plain_attention(q, k, v, mask)
    if mask is not None:
        # The kernels return 0 (CPU) or garbage for rows without a visible key.
        blind = (mask == -torch.inf).all(-1).expand(B, H, T)
        lse = lse.masked_fill(blind, -torch.inf)
        out = out.masked_fill(blind.unsqueeze(-1), 0.0)
    return out.transpose(1, 2), lse


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """As an additive mask of the query's dtype: kernels reject booleans, and misread float32 next to float64."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.logical_not(), -torch.inf)
    return mask.to(dtype)


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is not None:
        B, H, T, _ = q.shape
        mask = mask.expand(-1, -1, T, k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)


def _cuda_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    B, H, T, E = q.shape
    half = q.dtype in (torch.float16, torch.bfloat16)
    if half and mask is None and E % 8 == 0 and E <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse
    if q.dtype != torch.float64 and E % 8 == 0:
        if mask is not None:
            # The kernel wants rows aligned to 16 bytes: pad the storage, not the keys.
            S = k.shape[2]
            padded = mask.new_empty((*mask.shape[:2], T, -(-S // 16) * 16))
            padded[..., :S] = mask
            mask = padded[..., :S].expand(B, H, T, S)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)
        return out, lse[:, :, :T]  # padded to a multiple of 32 queries
    _warn_once(f"attention with log-sum-exp has no kernel for {q.dtype} with head width {E}; using the plain formula")
    return plain_attention(q, k, v, mask)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The formula itself, a few queries at a time; in float32, or float64 for float64. Layout (B, H, T, E)."""
    B, H, T, E = q.shape
    S = k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(B, H, T, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=wide, device=q.device)
    rows = max(1, _MATH_CHUNK_SCORES // (B * H * S))
    for start in range(0, T, rows):
        part = slice(start, start + rows)
        scores = q[:, :, part].to(wide) @ k.to(wide).transpose(-1, -2) / math.sqrt(E)
        if mask is not None:
            scores += mask if mask.shape[-2] == 1 else mask[:, :, part]
        lse[:, :, part] = torch.logsumexp(scores, dim=-1)
        out[:, :, part] = (torch.softmax(scores, dim=-1) @ v.to(wide)).to(q.dtype)
    return out, lse


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)
