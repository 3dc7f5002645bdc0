"""How long a step takes and what it holds, for each way to share it: by what is counted, measured and assumed.

What is computed and moved is counted from the shape (`step_cost`). What a card computes in a second, and what the link
carries, is measured or assumed, as who asks has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayltx.diffusion_models.lightricks.feed_forward import AUTOMATIC_INNER_BYTES
from rayltx.diffusion_models.lightricks.kept_text import part_for_text
from rayltx.diffusion_models.lightricks.step_cost import ModelShape, StepCost
from rayltx.sequence_parallel.exchange_memory import exchange_bytes
from rayltx.sequence_parallel.partition import ParallelConfig

# Of the exchange, that goes on behind attention: what `rayltx bench overlap` found on a modelled link, to within its noise.
HIDDEN = 0.8
ELEMENT_BYTES = 2  # of bfloat16
# Tensors of (tokens, width) that live at once at the peak of a block, beside those of the exchange: the residual stream, its
# normalised copy, query, key, value and output.
_LIVE_TENSORS = 6
_USABLE = 0.9  # of a card's memory
_WORTH_IT = 0.97  # of the time: what another card, or a ring, has to bring at least


@dataclass(frozen=True)
class Work:
    """A step."""

    model: ModelShape
    weight_bytes: int
    video_tokens: int
    audio_tokens: int
    rows: int = 1  # of the batch: 2 with guidance, times the clips


@dataclass(frozen=True)
class Cards:
    """Like ones."""

    flops_per_s: float
    link_bytes_per_s: float  # that a card receives from others
    small_s: float  # of a collective that carries nothing
    memory_bytes: int
    host_bytes_per_s: float  # from the host's memory, for weights that do not fit


# An RTX 4090 behind PCIe 4 without copies between cards.
ASSUMED_CARDS = Cards(
    flops_per_s=100e12, link_bytes_per_s=11e9, small_s=50e-6, memory_bytes=24 * 2**30, host_bytes_per_s=20e9
)


@dataclass(frozen=True)
class Plan:
    """One way to share a step."""

    config: ParallelConfig
    seconds: float
    speedup: float  # over one card
    received_bytes: float  # by a card
    activation_bytes: int  # on a card
    streamed_bytes: int  # of weights, that come from the host in every step
    bound_by: str  # what keeps more cards from bringing more

    @property
    def efficiency(self) -> float:
        return self.speedup / self.config.world_size


def activation_bytes(config: ParallelConfig, num_tokens: int, width: int, num_heads: int, rows: int = 1) -> int:
    """What a step holds on a card besides the weights, about."""
    groups = config.for_rows(rows)
    local = max(max(group.token_sizes(num_tokens).sizes) for group in groups) * rows // len(groups)
    inner = min(local * 4 * width * ELEMENT_BYTES, AUTOMATIC_INNER_BYTES)  # of the feed-forward, in automatic chunks
    exchanged = exchange_bytes(config, num_tokens, rows, num_heads, width // num_heads, ELEMENT_BYTES)
    return _LIVE_TENSORS * local * width * ELEMENT_BYTES + inner + exchanged


def ways_to_share(cards: int, rows: int) -> list[ParallelConfig]:
    """On 1 to `cards` cards: every ulysses x ring x cfg that has a use for this many rows."""
    return [
        ParallelConfig(ranks // (ring * groups), ring, groups)
        for ranks in range(1, cards + 1)
        for groups in range(1, rows + 1)
        for ring in range(1, ranks + 1)
        if rows % groups == 0 and ranks % (ring * groups) == 0
    ]


def plan(work: Work, cards: Cards, config: ParallelConfig) -> Plan:
    """What one way to share a step comes to."""
    alone = _seconds(work, cards, ParallelConfig())[0]
    seconds, cost, held, streamed = _seconds(work, cards, config)
    received = cost.received_elements * ELEMENT_BYTES
    bound_by = _bound_by(cards, cost, seconds, streamed)
    return Plan(config, seconds, alone / seconds, received, held, streamed, bound_by)


def _bound_by(cards: Cards, cost: StepCost, seconds: float, streamed: int) -> str:
    if streamed and seconds <= streamed / cards.host_bytes_per_s:
        return "weights do not fit, and come from the host's memory in every step"
    exchanging = cost.seconds(cards.flops_per_s, cards.link_bytes_per_s / ELEMENT_BYTES, hidden=HIDDEN)
    reasons = {
        "the link carries too little": exchanging - cost.seconds(cards.flops_per_s),
        "each exchange takes its time, however small": cost.collectives * cards.small_s,
        "every card does the text and the audio": cost.replicated_flops / cards.flops_per_s,
    }
    return max(reasons, key=lambda reason: reasons[reason])


def _seconds(work: Work, cards: Cards, config: ParallelConfig) -> tuple[float, StepCost, int, int]:
    """(seconds, the cost, bytes of activations, bytes of weights that are streamed)"""
    held = activation_bytes(config, work.video_tokens, work.model.width, work.model.heads, work.rows)
    left = int(_USABLE * cards.memory_bytes) - work.weight_bytes - held
    streamed = max(0, min(work.weight_bytes, -left))
    rows = work.rows // len(config.for_rows(work.rows))
    keeps_text = max(work.model.kept_text_elements(rows)) * ELEMENT_BYTES <= part_for_text(left, on_cpu=False)
    cost = StepCost.of(work.model, work.video_tokens, work.audio_tokens, config, work.rows, keeps_text)
    seconds = cost.seconds(cards.flops_per_s, cards.link_bytes_per_s / ELEMENT_BYTES, cards.small_s, HIDDEN)
    # Weights come a block ahead, next to computing.
    return max(seconds, streamed / cards.host_bytes_per_s), cost, held, streamed


def best(plans: Sequence[Plan]) -> Plan:
    """The fastest; with fewer cards where more bring next to nothing, and without a ring where one does, which merges by torch's
    kernels alone."""

    def effort(each: Plan) -> tuple[int, int]:
        return each.config.world_size, each.config.ring_degree

    chosen = min(plans, key=effort)
    for found in sorted(plans, key=lambda each: (*effort(each), each.seconds)):
        needed = _WORTH_IT if effort(found) > effort(chosen) else 1.0
        if found.seconds < needed * chosen.seconds:
            chosen = found
    return chosen
