"""Says where one GPU would be as fast as several: a small video, or a slow link.

By the time of a step and by what the first exchange measured of the link. What one GPU computes more is counted
(`step_cost`); that a rank waited for all of its exchange is supposed, which it does not, so one is called faster only where it
is by far.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from torch import Tensor

from rayltx.comfy_dist.comfy_types import DiffusionModel
from rayltx.comfy_dist.main_process.memory_estimate import Replicated
from rayltx.comfy_dist.model_spec import has_audio
from rayltx.diffusion_models.lightricks.comfyui_rows import batch_of
from rayltx.diffusion_models.lightricks.step_cost import ModelShape, StepCost
from rayltx.sequence_parallel.first_exchange import ExchangeReport
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_LOOKED_AT = 2  # the step of its kind: the first has more to do


class Gain:
    """Of one model's steps. Looks at each kind of step once."""

    def __init__(self) -> None:
        self._seen: Counter[object] = Counter()

    def after_step(
        self,
        model: DiffusionModel,
        x: Tensor | list[Tensor],
        config: ParallelConfig,
        exchange: ExchangeReport,
        element_bytes: int,
        seconds: float,
    ) -> None:
        """x: as the model's forward takes it. seconds: that the step took, on GPUs."""
        streams = x if isinstance(x, (list, tuple)) else [x]
        kind = config, tuple(stream.shape for stream in streams)
        self._seen[kind] += 1
        if self._seen[kind] != _LOOKED_AT:
            return
        tokens, audio_tokens, rows = streams[0][0, 0].numel(), Replicated.of(x, None).audio_tokens, batch_of(x)
        shape = shape_of(model)
        shared, alone = (
            StepCost.of(shape, tokens, audio_tokens, each, rows, True) for each in (config, ParallelConfig())
        )
        exchanging = shared.received_elements * element_bytes / exchange.bytes_per_s
        exchanging += shared.collectives * exchange.small_s
        alone_s = max(0.0, seconds - exchanging) * alone.flops / shared.flops
        if alone_s < seconds:
            logger.warning(
                "a step of %d video tokens takes %.2f s on %d GPUs, of which the link can take %.2f s (%.1f GB/s, %.2f ms for "
                "each of %d exchanges): one GPU would take about %.2f s. Set GPU, or gpus, to 1 for a video of this size",
                tokens, seconds, config.world_size, exchanging, exchange.bytes_per_s / 1e9, exchange.small_s * 1e3,
                shared.collectives, alone_s,
            )  # fmt: skip


def shape_of(model: Any) -> ModelShape:
    """Of a ComfyUI model, that may be without weights."""
    return ModelShape(
        blocks=len(model.transformer_blocks),
        width=model.inner_dim,
        audio_width=model.audio_inner_dim if has_audio(model) else 0,
        heads=model.num_attention_heads,
        modulates_text=hasattr(model.transformer_blocks[0], "prompt_scale_shift_table"),
    )
