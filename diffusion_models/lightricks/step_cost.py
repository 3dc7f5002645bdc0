"""What one forward of an LTX transformer computes and moves, counted from its shape. Norms and the like are left out.

Letters: N video tokens, D video width, A audio tokens, Da audio width, L text tokens, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT_TOKENS = 1024  # as ComfyUI's text encoders pad
COLLECTIVES_PER_BLOCK = 5  # query, key and value go, the output comes back, and video-to-audio attention is merged


@dataclass(frozen=True)
class ModelShape:
    """audio_width 0: a model without audio."""

    blocks: int
    width: int
    audio_width: int = 0


LTX_2 = ModelShape(blocks=48, width=4096, audio_width=2048)


@dataclass(frozen=True)
class StepCost:
    """One forward of one batch element on W ranks."""

    shared_flops: float  # of all ranks together
    replicated_flops: float  # of each rank
    received_elements: float  # by each rank, from others, in the dtype that is computed in
    collectives: int

    @classmethod
    def of(cls, shape: ModelShape, video_tokens: int, audio_tokens: int, ranks: int) -> StepCost:
        """Of an exchange by Ulysses alone, which moves the least."""
        N, D, A, Da, L = video_tokens, shape.width, audio_tokens, shape.audio_width, TEXT_TOKENS
        self_attention = 8 * N * D**2 + 4 * N**2 * D
        text_attention = 4 * N * D**2 + 4 * N * L * D
        feed_forward = 16 * N * D**2
        between = 8 * N * D * Da + 8 * N * A * Da  # audio-to-video and video-to-audio, what is done for video tokens
        text_keys = 4 * L * D * (D + Da)
        audio = 28 * A * Da**2 + 4 * A**2 * Da + 4 * A * L * Da + 8 * A * Da**2
        local = N / ranks
        merged = 2 * A * Da * (ranks - 1)  # video-to-audio: each rank's part from all, in float32, which counts twice
        return cls(
            shared_flops=float(shape.blocks * (self_attention + text_attention + feed_forward + between)),
            replicated_flops=float(shape.blocks * (text_keys + audio)),
            received_elements=shape.blocks * (4 * local * D * (ranks - 1) / ranks + merged),
            collectives=0 if ranks == 1 else shape.blocks * COLLECTIVES_PER_BLOCK,
        )

    def seconds(
        self, ranks: int, flops_per_s: float, elements_per_s: float = float("inf"), small_s: float = 0.0
    ) -> float:
        """How long it takes where nothing of the exchange is hidden behind computing.

        flops_per_s: of one device. elements_per_s: that a rank receives. small_s: of a collective that carries nothing.
        """
        computing = (self.shared_flops / ranks + self.replicated_flops) / flops_per_s
        return computing + self.received_elements / elements_per_s + self.collectives * small_s
