"""ComfyUI's Euler on a model of the workers, with LoRAs, and the times of its steps.

Within a process that has entered a ComfyUI.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from rayltx.comfy_dist.main_process.headless import conditioning_of, sample_with_comfyui

_TEXT_WIDTH = 48  # of the tiny models
_STRENGTH = 0.1  # of a LoRA's matrices


def sample(model: Any, shape: Sequence[int], text_tokens: int, steps: int) -> tuple[float, float]:
    """Seconds before the second step begins, and of a later step. shape: of the video's latent. steps: at least 2."""
    generator = torch.Generator().manual_seed(0)
    side = {"context": torch.randn(1, text_tokens, _TEXT_WIDTH, generator=generator), "frame_rate": 25.0}
    text = conditioning_of(side)
    noise = {"video": torch.randn(*shape, generator=generator)}
    times = [time.monotonic()]
    sample_with_comfyui(
        model, noise, torch.linspace(1.0, 0.0, steps + 1), text, text, 1.0, lambda step, latents: times.append(time.monotonic())
    )  # fmt: skip
    each = [after - before for before, after in itertools.pairwise(times)]
    return each[0], statistics.median(each[1:])


def with_lora(model: Any, width: int, seed: int, rank: int = 8) -> Any:
    """The model with a new LoRA on two layers."""
    import comfy.sd

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_v"):
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * _STRENGTH
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(width, rank, generator=generator) * _STRENGTH
    return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)[0]
