"""`rayltx bench compare`: our exchange around a layer's attention against other ways to share it, counted.

One layer's video self-attention and text attention with their projections, at the real width, on the rank with the most
tokens. Nothing is computed (see `fake_ranks`). The other ways are written here, in the fewest lines that show what they exchange:

- six exchanged and padded: tokens are padded to a multiple of the ranks; query, key, value and output are traded for heads; so
  are text key and value, for which the text is padded and shared, too, and with them the queries and outputs of text attention.
- keys and values gathered: every rank has its queries, and gathers all keys and values.

Letters: D width, H heads, E head width, L text tokens, N video tokens, W ranks.
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
from rayltx.diffusion_models.lightricks.sharded_attention import ShardedSequence
from rayltx.diffusion_models.lightricks.step_cost import LTX_2, TEXT_TOKENS
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig
from rayltx.sequence_parallel.sharded_keys import ALL_GATHER

_DTYPE = torch.bfloat16
_D, _H, _L = LTX_2.width, LTX_2.heads, TEXT_TOKENS
_SIX = "six exchanged and padded"
OURS, _ALONE = "RayLTX", "one rank, nothing exchanged"

# Of the group, the number of all video tokens, this rank's, all text, and a weight that stands for all.
Layer = Callable[[SequenceParallelGroup, int, Tensor, Tensor, Tensor], Tensor]


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
        alone = counts_of(_ours, ParallelConfig(), shape.num_tokens)
        for ranks in options.ranks:
            ways = {name: way for name, way in WAYS.items() if name != _SIX or _H % ranks == 0}
            found = {_ALONE: alone}
            found |= {name: counts_of(way, ParallelConfig(ranks), shape.num_tokens) for name, way in ways.items()}
            if _SIX not in ways:
                report.remarks.append(
                    f"{ranks} ranks: heads that are not padded cannot be traded evenly; {_H} have to divide"
                )
            of = f"on one of {ranks} ranks"
            numbers = {
                ("received", "MiB"): {name: each.received_bytes / 2**20 for name, each in found.items()},
                ("computed", "GFLOP"): {name: each.flops / 1e9 for name, each in found.items()},
                ("held at the peak", "MiB"): {name: each.peak_bytes / 2**20 for name, each in found.items()},
                ("collectives", ""): {name: float(each.collectives) for name, each in found.items()},
            }
            for (what, unit), by_way in numbers.items():
                arms = tuple(Arm(name, (value,)) for name, value in by_way.items())
                report.measurements.append(Measurement(f"{what} {of}", unit, Clock.NONE, arms))
        report.remarks.append(
            f"one layer's video self-attention and text attention of LTX-2, with projections: {shape.num_tokens} video tokens, "
            f"{_L} of text, bfloat16; counted, not timed"
        )


def counts_of(way: Layer, config: ParallelConfig, num_tokens: int) -> Counts:
    """Of the rank with the most tokens."""
    with rank_zero_of(config) as group, FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        num_local = config.token_sizes(num_tokens).sizes[0]
        x, text, weight = (torch.empty(*shape, dtype=_DTYPE) for shape in ((1, num_local, _D), (1, _L, _D), (_D, _D)))
        with counted() as counts:
            out = way(group, num_tokens, x, text, weight)
        del out
        return counts


def _heads(x: Tensor) -> Tensor:
    """(1, tokens, D) to (1, tokens, H, E)."""
    return x.unflatten(-1, (-1, _D // _H))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """(1, tokens, heads, E)"""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _ours(group: SequenceParallelGroup, num_tokens: int, x: Tensor, text: Tensor, weight: Tensor) -> Tensor:
    exchange = ShardedSequence.of(group, num_tokens).self_exchange(_H, 1)
    value, query, key = (exchange.send(_heads(linear(x, weight))) for _ in range(3))
    x = x + linear(exchange.attend(query, key, value, _attend).flatten(2), weight)
    out = _attend(_heads(linear(x, weight)), _heads(linear(text, weight)), _heads(linear(text, weight)))
    return x + linear(out.flatten(2), weight)


def _six_exchanged(group: SequenceParallelGroup, num_tokens: int, x: Tensor, text: Tensor, weight: Tensor) -> Tensor:
    """x: padded."""
    ranks, num_text = group.world_size, text.shape[1]
    part = -(-num_text // ranks)
    text = pad(text, (0, 0, 0, ranks * part - num_text)).narrow(1, group.rank * part, part)
    padded = ranks * x.shape[1]
    mask = None if padded == num_tokens else torch.arange(padded).lt(num_tokens)[None, None, None]

    def to_heads(x: Tensor) -> Tensor:
        """(1, n, H, E) to (1, W n, H / W, E)."""
        sent = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()
        return _exchanged(sent).transpose(0, 1).flatten(1, 2)

    def to_tokens(x: Tensor) -> Tensor:
        """The way back."""
        sent = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
        return _exchanged(sent).permute(1, 2, 0, 3, 4).flatten(2, 3)

    query, key, value = (to_heads(_heads(linear(x, weight))) for _ in range(3))
    x = x + linear(to_tokens(_attend(query, key, value, mask)).flatten(2), weight)
    del query, key, value
    query = to_heads(_heads(linear(x, weight)))
    text_key, text_value = (to_heads(_heads(linear(text, weight)))[:, :num_text] for _ in range(2))
    return x + linear(to_tokens(_attend(query, text_key, text_value)).flatten(2), weight)


def _gathered(group: SequenceParallelGroup, num_tokens: int, x: Tensor, text: Tensor, weight: Tensor) -> Tensor:
    """x: padded."""
    ranks = group.world_size

    def from_all(x: Tensor) -> Tensor:
        gathered = x.new_empty(ranks, *x.shape[1:])
        getattr(dist, ALL_GATHER)(gathered, x.contiguous())
        return gathered.flatten(0, 1)[None, :num_tokens]

    key, value = (from_all(_heads(linear(x, weight))) for _ in range(2))
    x = x + linear(_attend(_heads(linear(x, weight)), key, value).flatten(2), weight)
    del key, value
    out = _attend(_heads(linear(x, weight)), _heads(linear(text, weight)), _heads(linear(text, weight)))
    return x + linear(out.flatten(2), weight)


def _exchanged(sent: Tensor) -> Tensor:
    """sent: (W, ...), a part for each rank. Returns what each has sent here."""
    received, parts = torch.empty_like(sent), [sent[0].numel()] * sent.shape[0]
    dist.all_to_all_single(received.view(-1), sent.view(-1), parts, parts)
    return received


WAYS: dict[str, Layer] = {
    OURS: _ours,
    _SIX: _six_exchanged,
    "keys and values gathered": _gathered,
}
