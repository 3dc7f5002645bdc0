"""How long a step takes and what it holds, for each way to share it: by what is counted, measured and assumed.

What is computed and moved is counted from the shape (`step_cost`). What a card computes in a second, and what the link
carries, is measured or assumed, as who asks has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayltx.diffusion_models.lightricks.feed_forward import AUTOMATIC_INNER_BYTES
from rayltx.diffusion_models.lightricks.step_cost import ModelShape, StepCost
from rayltx.sequence_parallel.exchange_memory import exchange_bytes
from rayltx.sequence_parallel.partition import ParallelConfig

# Of the exchange, that goes on behind attention: what `benchmarks/overlap.py` found on a modelled link, to within its noise.
HIDDEN = 0.8
ELEMENT_BYTES = 2  # of bfloat16
# Tensors of (tokens, width) that live at once at the peak of a block, beside those of the exchange: the residual stream, its
# normalised copy, query, key, value and output.
_LIVE_TENSORS = 6
_USABLE = 0.9  # of a card's memory
_WORTH_A_CARD = 0.97  # of the time: what another card has to bring at least


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


@dataclass(frozen=True)
class Plan:
    """One way to share a step."""

    config: ParallelConfig
    seconds: float
    speedup: float  # over one card
    received_bytes: float  # by a card
    activation_bytes: int  # on a card
    streamed_bytes: int  # of weights, that come from the host in every step

    @property
    def bound_by(self) -> str:
        """What keeps more cards from bringing more."""
        if self.streamed_bytes:
            return "weights do not fit, and come from the host's memory in every step"
        return "the link carries too little"

    @property
    def efficiency(self) -> float:
        return self.speedup / self.config.world_size


def activation_bytes(config: ParallelConfig, num_tokens: int, width: int, rows: int = 1) -> int:
    """What a step holds on a card besides the weights, about."""
    groups = config.groups_of(rows)
    local = max(config.of_group(groups).token_sizes(num_tokens).sizes) * rows // groups
    inner = min(local * 4 * width * ELEMENT_BYTES, AUTOMATIC_INNER_BYTES)  # of the feed-forward, in automatic chunks
    exchanged = exchange_bytes(config, num_tokens, rows, width, ELEMENT_BYTES)
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
    return Plan(config, seconds, alone / seconds, cost.received_elements * ELEMENT_BYTES, held, streamed)


def _seconds(work: Work, cards: Cards, config: ParallelConfig) -> tuple[float, StepCost, int, int]:
    """(seconds, the cost, bytes of activations, bytes of weights that are streamed)"""
    cost = StepCost.of(work.model, work.video_tokens, work.audio_tokens, config, work.rows)
    held = activation_bytes(config, work.video_tokens, work.model.width, work.rows)
    streamed = max(0, min(work.weight_bytes, int(work.weight_bytes + held - _USABLE * cards.memory_bytes)))
    seconds = cost.seconds(cards.flops_per_s, cards.link_bytes_per_s / ELEMENT_BYTES, cards.small_s, HIDDEN)
    # Weights come a block ahead, next to computing.
    return max(seconds, streamed / cards.host_bytes_per_s), cost, held, streamed


def best(plans: Sequence[Plan]) -> Plan:
    """The fastest; with fewer cards where more bring next to nothing, and with the fewest bytes among equals."""
    chosen = min(plans, key=lambda found: found.config.world_size)
    for found in sorted(plans, key=lambda each: (each.config.world_size, each.seconds, each.received_bytes)):
        needed = _WORTH_A_CARD if found.config.world_size > chosen.config.world_size else 1.0
        if found.seconds < needed * chosen.seconds:
            chosen = found
    return chosen
