"""ComfyUI's video self-attention, whose parts are sent to the other ranks as soon as each is projected.

ComfyUI projects query, key and value before it attends, so that all of them would be waited for. Here the same layers run in
the order value, query, key, each sent while the next is computed, and the gates while the outputs are on their way. The numbers
are the same. It is written for a forward whose code is known: one of another version, or of a patch, is not taken for it.

Letters in shapes: B batch, n tokens of this rank, D width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rayltx.diffusion_models.lightricks.known_code import has_known_forward
from rayltx.diffusion_models.lightricks.sharded_attention import ShardedSequence
from rayltx.sequence_parallel.local_attention import Attend

_KNOWN = (
    "84573b95b816d136",  # `CrossAttention.forward`, 0.20
    "4293b94812c8b659",  # 0.24 to 0.28
    "4633212c9d9aec51",  # 0.29 to 0.30
    "adac9916edd1cbfd",  # 0.33
)
SKIPPED = "stg_skip_self_attn"  # in the options, where the values pass through


def is_known(attention: nn.Module) -> bool:
    """Whether a module's forward is ComfyUI's own of a known version, word for word."""
    return has_known_forward(attention, _KNOWN)


def kernel_of(attention: nn.Module) -> Callable[..., Tensor]:
    """The attention that the module's forward calls, of a known module. q, k, v: (B, tokens, D)."""
    kernel: Callable[..., Tensor] = _globals_of(attention)["comfy"].ldm.modules.attention.optimized_attention
    return kernel


def _globals_of(attention: nn.Module) -> dict[str, Any]:
    forward: Any = type(attention).forward
    names: dict[str, Any] = forward.__globals__
    return names


def attend_while_projecting(
    attention: Any,
    sequence: ShardedSequence,
    x: Tensor,
    positions: Any,
    attend: Attend,
    meanwhile: Callable[[], None] | None = None,
) -> Tensor:
    """The forward of a known module, for this rank's tokens.

    x: (B, n, D). positions: what the module's forward takes as `pe`. attend: the kernel, for heads of (B, tokens, H, E).
    meanwhile: called where the keys are on their way, before they are waited for.
    Returns (B, n, D). Collective.
    """
    rotate = _globals_of(attention)["apply_rotary_emb"]

    def send(projected: Tensor) -> Any:
        return exchange.send(projected.unflatten(2, (attention.heads, attention.dim_head)))

    def rotated(projected: Tensor) -> Tensor:
        return projected if positions is None else rotate(projected, positions)

    exchange = sequence.self_exchange(attention.heads, x.shape[0])
    value = send(attention.to_v(x))
    query = send(rotated(attention.q_norm(attention.to_q(x))))
    key = send(rotated(attention.k_norm(attention.to_k(x))))
    gates = None
    if attention.to_gate_logits is not None:  # while the keys are on their way
        gates = 2.0 * torch.sigmoid(attention.to_gate_logits(x))
    if meanwhile is not None:
        meanwhile()
    out = exchange.attend(query, key, value, attend, mask=sequence.self_attention_mask)
    if gates is not None:
        out = out * gates.unsqueeze(-1)
    answer: Tensor = attention.to_out(out.flatten(2))
    return answer
