"""`rayltx bench compare`: our exchange around a layer's attention against other ways to share it, counted.

One layer's attention of LTX-2 in which video tokens have a part, with its projections: video to video, video to text, and sound
to video, whose queries are few. At the real width, on the rank with the most tokens. Nothing is computed (see `fake_ranks`). The
other ways are written here, in the fewest lines that show what they exchange:

- all traded and padded: tokens of every kind are padded to a multiple of the ranks and shared; each attention trades its query,
  key, value and output for heads. As context parallelism by hooks has it, which does not know what an attention is for.
- traded, text and sound whole: every rank has the text and the sound. Video self-attention trades query, key, value and output
  for heads; the sound's trades the video's key and value, and gathers its output by heads. As Lightricks' own.
- keys and values gathered: every rank has its queries, and gathers all keys and values.

Letters: D width, H heads, E head width, L text tokens, A sound's tokens, N video tokens, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from rayltx.cli.bench.fake_ranks import Counts, counted, rank_zero_of
from rayltx.cli.bench.measurements import Arm, Clock, Measurement
from rayltx.cli.bench.report import Output, reporting
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.roles import AttentionRole
from rayltx.diffusion_models.lightricks.sharded_attention import ShardedSequence
from rayltx.diffusion_models.lightricks.step_cost import LTX_2, TEXT_TOKENS, StepCost
from rayltx.diffusion_models.lightricks.step_plan import ASSUMED_CARDS, ELEMENT_BYTES
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig
from rayltx.sequence_parallel.sharded_keys import ALL_GATHER

_DTYPE = torch.bfloat16
_D, _H, _L = LTX_2.width, LTX_2.heads, TEXT_TOKENS
_D_SOUND = LTX_2.audio_width
_ALL, _VIDEO = "all traded and padded", "traded, text and sound whole"
_BY_HEADS = (_ALL, _VIDEO)  # which cannot share heads that the ranks do not divide
OURS, _ALONE = "RayLTX", "one rank, nothing exchanged"


@dataclass(frozen=True)
class LayerInput:
    """What a rank has: its video tokens, all of the text and of the sound, and weights that stand for all."""

    num_tokens: int  # of the video, on all ranks
    video: Tensor  # (1, n, D); padded but for ours
    text: Tensor  # (1, L, D)
    sound: Tensor  # (1, A, D of sound)
    weight: Tensor  # (D, D)
    weight_to_sound: Tensor  # (D of sound, D)
    weight_of_sound: Tensor  # (D of sound, D of sound)


# Gives this rank's video tokens, and all of the sound.
Layer = Callable[[SequenceParallelGroup, LayerInput], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CompareOptions:
    ranks: Sequence[int]
    width: int
    height: int
    frames: int


def run_compare(options: CompareOptions, output: Output) -> None:
    """Print. Raises InputError."""
    if min(options.ranks) < 2:
        raise InputError(f"ranks={min(options.ranks)} must be at least 2; one rank is always counted")
    shape = LatentShape.from_pixels(options.width, options.height, options.frames)
    with reporting("compare", vars(options), output) as report:
        alone = counts_of(_ours, ParallelConfig(), shape)
        for ranks in options.ranks:
            ways = {name: way for name, way in WAYS.items() if name not in _BY_HEADS or _H % ranks == 0}
            found = {_ALONE: alone}
            found |= {name: counts_of(way, ParallelConfig(ranks), shape) for name, way in ways.items()}
            if len(ways) < len(WAYS):
                report.remarks.append(
                    f"{ranks} ranks: heads that are not padded cannot be traded evenly; {_H} have to divide"
                )
            of = f"on one of {ranks} ranks"
            numbers = {
                ("received", "MiB"): {name: each.received_bytes / 2**20 for name, each in found.items()},
                ("computed", "GFLOP"): {name: each.flops / 1e9 for name, each in found.items()},
                ("held at the peak", "MiB"): {name: each.peak_bytes / 2**20 for name, each in found.items()},
                ("collectives", ""): {name: float(each.collectives) for name, each in found.items()},
                ("calculated time", "ms"): {name: _seconds(each) * 1e3 for name, each in found.items()},
            }
            for (what, unit), by_way in numbers.items():
                arms = tuple(Arm(name, (value,)) for name, value in by_way.items())
                report.measurements.append(Measurement(f"{what} {of}", unit, Clock.NONE, arms))
        report.remarks.append(
            f"one layer's attention of video to video, video to text and sound to video of LTX-2, with projections: "
            f"{shape.num_tokens} video tokens, {_L} of text, {shape.audio_tokens()} of sound, bfloat16; counted. The time is "
            f"calculated for each alike: products at {ASSUMED_CARDS.flops_per_s / 1e12:.0f} TFLOP/s, what is received at "
            f"{ASSUMED_CARDS.link_bytes_per_s / 1e9:.0f} GB/s with nothing of it behind computing, and "
            f"{ASSUMED_CARDS.small_s * 1e6:.0f} us for each collective (assumed)"
        )


def _seconds(counts: Counts) -> float:
    cards = ASSUMED_CARDS
    cost = StepCost(counts.flops, 0.0, counts.received_bytes / ELEMENT_BYTES, counts.collectives)
    return cost.seconds(cards.flops_per_s, cards.link_bytes_per_s / ELEMENT_BYTES, cards.small_s)


def counts_of(way: Layer, config: ParallelConfig, shape: LatentShape) -> Counts:
    """Of the rank with the most tokens."""
    with rank_zero_of(config) as group, FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        num_local = config.token_sizes(shape.num_tokens).sizes[0]
        sizes = (
            (1, num_local, _D), (1, _L, _D), (1, shape.audio_tokens(), _D_SOUND),
            (_D, _D), (_D_SOUND, _D), (_D_SOUND, _D_SOUND),
        )  # fmt: skip
        inputs = LayerInput(shape.num_tokens, *(torch.empty(*size, dtype=_DTYPE) for size in sizes))
        with counted() as counts:
            out = way(group, inputs)
        del out
        return counts


def _heads(x: Tensor) -> Tensor:
    """(1, tokens, width) to (1, tokens, H, E)."""
    return x.unflatten(-1, (_H, -1))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """(1, tokens, heads, E)"""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _with_text(x: Tensor, of: LayerInput) -> Tensor:
    """The video after it has looked at all of the text, which is here."""
    key, value = (_heads(linear(of.text, of.weight)) for _ in range(2))
    return x + linear(_attend(_heads(linear(x, of.weight)), key, value).flatten(2), of.weight)


def _for_sound(x: Tensor, of: LayerInput) -> tuple[Tensor, Tensor]:
    """Keys and values of video tokens, for the sound's queries."""
    return _heads(linear(x, of.weight_to_sound)), _heads(linear(x, of.weight_to_sound))


def _ours(group: SequenceParallelGroup, of: LayerInput) -> tuple[Tensor, Tensor]:
    sequence = ShardedSequence.of(group, of.num_tokens)
    exchange = sequence.self_exchange(_H, 1)
    sent_value, sent_query, sent_key = (exchange.send(_heads(linear(of.video, of.weight))) for _ in range(3))
    x = of.video + linear(exchange.attend(sent_query, sent_key, sent_value, _attend).flatten(2), of.weight)
    x = _with_text(x, of)
    query, (key, value) = _heads(linear(of.sound, of.weight_of_sound)), _for_sound(x, of)
    out = sequence.attend(AttentionRole.VIDEO_TO_AUDIO, query, key, value, _attend)
    return x, of.sound + linear(out.flatten(2), of.weight_of_sound)


def _all_traded(group: SequenceParallelGroup, of: LayerInput) -> tuple[Tensor, Tensor]:
    ranks = group.world_size
    x = of.video + linear(_self_attention_by_heads(group, of).flatten(2), of.weight)
    text, sound = _part(of.text, group), _part(of.sound, group)
    query = _to_heads(_heads(linear(x, of.weight)), ranks)
    key, value = (_to_heads(_heads(linear(text, of.weight)), ranks)[:, : of.text.shape[1]] for _ in range(2))
    x = x + linear(_to_tokens(_attend(query, key, value), ranks).flatten(2), of.weight)
    key, value = (_to_heads(each, ranks)[:, : of.num_tokens] for each in _for_sound(x, of))
    query = _to_heads(_heads(linear(sound, of.weight_of_sound)), ranks)
    sound = sound + linear(_to_tokens(_attend(query, key, value), ranks).flatten(2), of.weight_of_sound)
    return x, sound


def _video_traded(group: SequenceParallelGroup, of: LayerInput) -> tuple[Tensor, Tensor]:
    ranks = group.world_size
    x = of.video + linear(_self_attention_by_heads(group, of).flatten(2), of.weight)
    x = _with_text(x, of)
    key, value = (_to_heads(each, ranks)[:, : of.num_tokens] for each in _for_sound(x, of))
    query = _heads(linear(of.sound, of.weight_of_sound)).chunk(ranks, 2)[group.rank]
    out = _from_all(_attend(query, key, value), ranks).movedim(0, 2).flatten(2)  # heads lie one after another
    return x, of.sound + linear(out, of.weight_of_sound)


def _gathered(group: SequenceParallelGroup, of: LayerInput) -> tuple[Tensor, Tensor]:
    def whole(x: Tensor) -> Tensor:
        return _from_all(x, group.world_size)[:, 0].flatten(0, 1)[None, : of.num_tokens]

    key, value = (whole(_heads(linear(of.video, of.weight))) for _ in range(2))
    x = of.video + linear(_attend(_heads(linear(of.video, of.weight)), key, value).flatten(2), of.weight)
    del key, value
    x = _with_text(x, of)
    key, value = map(whole, _for_sound(x, of))
    out = _attend(_heads(linear(of.sound, of.weight_of_sound)), key, value)
    return x, of.sound + linear(out.flatten(2), of.weight_of_sound)


def _self_attention_by_heads(group: SequenceParallelGroup, of: LayerInput) -> Tensor:
    """Of padded tokens; (1, n, H, E)."""
    ranks = group.world_size
    padded = ranks * of.video.shape[1]
    mask = None if padded == of.num_tokens else torch.arange(padded).lt(of.num_tokens)[None, None, None]
    query, key, value = (_to_heads(_heads(linear(of.video, of.weight)), ranks) for _ in range(3))
    return _to_tokens(_attend(query, key, value, mask), ranks)


def _part(x: Tensor, group: SequenceParallelGroup) -> Tensor:
    """A rank's of tokens that all have, padded."""
    size = -(-x.shape[1] // group.world_size)
    return pad(x, (0, 0, 0, group.world_size * size - x.shape[1])).narrow(1, group.rank * size, size)


def _to_heads(x: Tensor, ranks: int) -> Tensor:
    """(1, n, H, E) to (1, W n, H / W, E)."""
    sent = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()
    return _exchanged(sent).transpose(0, 1).flatten(1, 2)


def _to_tokens(x: Tensor, ranks: int) -> Tensor:
    """The way back."""
    sent = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    return _exchanged(sent).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _exchanged(sent: Tensor) -> Tensor:
    """sent: (W, ...), a part for each rank. Returns what each has sent here."""
    received, parts = torch.empty_like(sent), [sent[0].numel()] * sent.shape[0]
    dist.all_to_all_single(received.view(-1), sent.view(-1), parts, parts)
    return received


def _from_all(x: Tensor, ranks: int) -> Tensor:
    """(W, ...), what each rank has."""
    gathered = x.new_empty(ranks, *x.shape)
    getattr(dist, ALL_GATHER)(gathered.view(-1), x.contiguous().view(-1))
    return gathered


WAYS: dict[str, Layer] = {
    OURS: _ours,
    _ALL: _all_traded,
    _VIDEO: _video_traded,
    "keys and values gathered": _gathered,
}
