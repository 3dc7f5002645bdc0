"""What one forward of an LTX transformer computes and moves, counted from its shape. Norms and the like are left out.

Letters: N video tokens, D video width, A audio tokens, Da audio width, L text tokens, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayltx.sequence_parallel.partition import ParallelConfig
from rayltx.sequence_parallel.self_attention import head_groups

TEXT_TOKENS = 1024  # as ComfyUI's text encoders pad
_HIDING = 0.3  # of the time of computing, behind which an exchange can go on: as far as it was measured (`rayltx bench overlap`)


@dataclass(frozen=True)
class ModelShape:
    """audio_width 0: a model without audio."""

    blocks: int
    width: int
    audio_width: int = 0
    heads: int = 32  # as all of LTX's have
    modulates_text: bool = False  # by the step's noise, as LTX-2.3 does: its keys are others at each step

    def kept_text_elements(self, rows: int = 1) -> tuple[int, int]:
        """Of the keys and values in all blocks, of the video's text and the sound's, which `kept_text` keeps."""
        a_width = 0 if self.modulates_text else rows * self.blocks * 2 * TEXT_TOKENS
        return a_width * self.width, a_width * self.audio_width


LTX_2 = ModelShape(blocks=48, width=4096, audio_width=2048)


def _collectives(shape: ModelShape, video_tokens: int, rows: int, config: ParallelConfig) -> int:
    """Of a block: query, key and value go, the output comes back, in groups of heads; keys and values go round; and
    video-to-audio attention is merged, by more than two ranks in two."""
    ranks, ulysses, ring = config.world_size, config.ulysses_degree, config.ring_degree
    heads = min(config.head_sizes(shape.heads).sizes)
    in_groups = head_groups(video_tokens, rows, heads) if ring == 1 and heads else 1
    traded = 4 * in_groups if ulysses > 1 else 0
    merged = 0 if ranks == 1 or not shape.audio_width else 1 if ranks == 2 else 2
    return traded + ring - 1 + merged


@dataclass(frozen=True)
class StepCost:
    """One forward of a batch, for the rank that has most to do."""

    flops: float
    replicated_flops: float  # of these, what every rank of its group computes as well
    received_elements: float  # from other ranks, in the dtype that is computed in
    collectives: int

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        video_tokens: int,
        audio_tokens: int,
        config: ParallelConfig,
        rows: int = 1,
        keeps_text: bool = False,
    ) -> StepCost:
        """rows: of the batch, such as 2 with guidance; they go to as many groups as `batch_rows` says. keeps_text: whether the
        text's keys are there from an earlier step, if steps do not change them."""
        N, D, A, Da, L = video_tokens, shape.width, audio_tokens, shape.audio_width, TEXT_TOKENS
        groups = config.for_rows(rows)
        within, rows = groups[0], rows // len(groups)
        ranks, ulysses, ring = within.world_size, within.ulysses_degree, within.ring_degree
        self_attention = 8 * N * D**2 + 4 * N**2 * D
        text_attention = 4 * N * D**2 + 4 * N * L * D
        feed_forward = 16 * N * D**2
        between = 8 * N * D * Da + 8 * N * A * Da  # audio-to-video and video-to-audio, what is done for video tokens
        text_keys = 0 if keeps_text and not shape.modulates_text else 4 * L * (D**2 + Da**2)
        audio = 28 * A * Da**2 + 4 * A**2 * Da + 4 * A * L * Da + 8 * A * Da**2
        local = max(max(group.token_sizes(N).sizes) for group in groups)
        shared = (self_attention + text_attention + feed_forward + between) * local / N
        traded = 4 * local * D * (ulysses - 1) / ulysses  # query, key and value go, the output comes back
        passed_on = 2 * local * D * (ring - 1)  # key and value
        # Video-to-audio: each rank's part, in float32, which counts twice; from all, or of its heads, and the answer then.
        merged = 2 * A * Da * (ranks - 1) if ranks == 2 else 3 * A * Da * (ranks - 1) / ranks
        return cls(
            flops=float(rows * shape.blocks * (shared + text_keys + audio)),
            replicated_flops=float(rows * shape.blocks * (text_keys + audio)),
            received_elements=rows * shape.blocks * (traded + passed_on + merged),
            collectives=shape.blocks * _collectives(shape, N, rows, within),
        )

    def seconds(
        self, flops_per_s: float, elements_per_s: float = float("inf"), small_s: float = 0.0, hidden: float = 0.0
    ) -> float:
        """How long it takes.

        flops_per_s: of one device. elements_per_s: that a rank receives. small_s: of a collective that carries nothing.
        hidden: the share of the exchange that goes on behind computing, while it takes less than three tenths of it.
        """
        computing, exchanging = self.flops / flops_per_s, self.received_elements / elements_per_s
        return computing + exchanging - hidden * min(exchanging, _HIDING * computing) + self.collectives * small_s


def computing_s(seconds: float, exchanging_s: float, hidden: float) -> float:
    """What of a step's seconds its rank computes, if the exchange takes so many: the inverse of `StepCost.seconds`."""
    computing = seconds - (1 - hidden) * exchanging_s
    if exchanging_s > _HIDING * computing:  # more than goes on behind it
        computing = (seconds - exchanging_s) / (1 - hidden * _HIDING)
    return max(0.0, computing)
