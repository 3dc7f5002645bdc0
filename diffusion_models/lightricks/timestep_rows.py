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

    values: (B, R). index: (n,) int64, the row of each token; None where one row serves all.
    """

    values: Tensor
    index: Tensor | None

    @classmethod
    def compress(cls, timestep_local: Tensor) -> TimestepRows:
        """Keep one row for each run of tokens with the same timesteps.

        timestep_local: (B, 1), one for all tokens; or (B, n), one a token. Frames with one timestep become one row
        each, as many as the tokens touch, wherever the slice begins; what differs from token to token stays so.
        """
        if timestep_local.shape[1] == 1:
            return cls(timestep_local, None)
        if timestep_local.shape[1] == 0:  # a rank without tokens: any row broadcasts over none
            return cls(timestep_local.new_zeros(timestep_local.shape[0], 1), None)
        values, index = torch.unique_consecutive(timestep_local, dim=1, return_inverse=True)
        return cls(values, index)

    @classmethod
    def of_tokens(cls, timestep: Tensor, shape: LatentShape, tokens: slice) -> TimestepRows:
        """Keep what some of a video's tokens need.

        timestep: (B,) or (B, 1), one for all tokens; (B, F), one a latent frame; or (B, N), one a token.
        tokens: which of the N. Raises InputError for other shapes.
        """
        if timestep.ndim == 1:
            timestep = timestep[:, None]
        count = timestep.shape[1] if timestep.ndim == 2 else -1
        if count not in (1, shape.frames, shape.num_tokens):
            raise InputError(
                f"timestep has the shape {tuple(timestep.shape)}: it must hold 1, {shape.frames} (one a latent frame) "
                f"or {shape.num_tokens} (one a token) values for each of the batch"
            )
        if count == shape.frames != shape.num_tokens and count != 1:
            timestep = timestep.repeat_interleave(shape.tokens_per_frame, dim=1)
        elif count == 1 and shape.num_tokens > 1:
            return cls(timestep, None)
        return cls.compress(timestep[:, tokens])

    def expand(self, rows: Tensor) -> Tensor:
        """Give each token its row of what was computed from `values.flatten()`.

        rows: (B R, C). Returns (B n, C), or `rows` where one serves all.
        """
        if self.index is None:
            return rows
        B = self.values.shape[0]
        return rows.view(B, -1, rows.shape[-1]).index_select(1, self.index).flatten(0, 1)
