"""Timesteps, and what is computed from them, with one row for each different value.

A modulation has 6 times the model's width. Most timesteps are the same for all tokens, or for all tokens of a latent
frame (image-to-video), so the rows are kept as they differ, and an index says which row a token takes.

Letters in shapes: B batch, R rows, n tokens of this rank, N tokens, F latent frames, C any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.errors import InputError


@dataclass(frozen=True)
class TimestepRows:
    """The timesteps of a rank's tokens.

    values: (B, R). index: (n,) int64, the row of each token; None where one row serves all, or each token has its own.
    """

    values: Tensor
    index: Tensor | None

    @classmethod
    def of_tokens(cls, timestep: Tensor, shape: LatentShape, tokens: slice) -> TimestepRows:
        """Keep what some of a video's tokens need.

        timestep: (B,) or (B, 1), one for all tokens; (B, F), one a latent frame; or (B, N), one a token. One a token
        that is constant over each frame is kept as one a frame. `tokens`: which of the N.
        Raises InputError for other shapes.
        """
        if timestep.ndim == 1:
            timestep = timestep[:, None]
        B, count = timestep.shape[0], timestep.shape[1] if timestep.ndim == 2 else -1
        if count == 1 or (tokens.start == tokens.stop and count in (shape.frames, shape.num_tokens)):
            return cls(timestep[:, :1], None)
        if count == shape.num_tokens:
            by_frame = timestep.view(B, shape.frames, shape.tokens_per_frame)
            if not bool((by_frame == by_frame[:, :, :1]).all()):
                return cls(timestep[:, tokens], None)
            timestep, count = by_frame[:, :, 0], shape.frames
        if count != shape.frames:
            raise InputError(
                f"timestep has the shape {tuple(timestep.shape)}: it must hold 1, {shape.frames} (one a latent frame) "
                f"or {shape.num_tokens} (one a token) values for each of the batch"
            )
        first = tokens.start // shape.tokens_per_frame
        last = (tokens.stop - 1) // shape.tokens_per_frame
        position = torch.arange(tokens.start, tokens.stop, device=timestep.device)
        index = torch.div(position, shape.tokens_per_frame, rounding_mode="floor") - first
        return cls(timestep[:, first : last + 1], index)

    def expand(self, rows: Tensor) -> Tensor:
        """Give each token its row of what was computed from `values.flatten()`.

        rows: (B R, C). Returns (B n, C), or `rows` where they need no index (they broadcast, or are one a token).
        """
        if self.index is None:
            return rows
        B = self.values.shape[0]
        return rows.view(B, -1, rows.shape[-1]).index_select(1, self.index).flatten(0, 1)
