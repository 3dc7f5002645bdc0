"""Self-attention masks, cut to the queries and keys that meet on a rank.

A mask belongs to a whole sequence of N tokens. What a rank attends to at once is a range of queries against a range
of keys with some of the heads, and `pieces` gives the mask of just that, as one or more runs of queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rayltx.sequence_parallel.local_attention import Attend, AttendWithLse


class SelfAttentionMask(Protocol):
    def pieces(self, queries: slice, keys: slice, heads: slice) -> Iterator[tuple[slice, Tensor | None]]:
        """Runs that cover `queries` in order: (slice relative to queries.start, additive mask or None).

        A mask is broadcastable to (B, heads, run, keys).
        """
        ...


@dataclass(frozen=True)
class DenseMask:
    """One value for each pair of tokens: additive or boolean, (1|B, 1|H, 1|N, N)."""

    values: Tensor

    def pieces(self, queries: slice, keys: slice, heads: slice) -> Iterator[tuple[slice, Tensor | None]]:
        yield slice(0, queries.stop - queries.start), _cut(self.values, queries, keys, heads)


@dataclass(frozen=True)
class GroupedMask:
    """Consecutive groups of queries, each with a mask of its own.

    groups: (number of queries, None or (1|B, 1|H, 1|queries, N)); the numbers add up to N. Where most queries share
    one row, as with guide frames, this never holds N x N values.
    """

    groups: tuple[tuple[int, Tensor | None], ...]

    def pieces(self, queries: slice, keys: slice, heads: slice) -> Iterator[tuple[slice, Tensor | None]]:
        start = 0
        for count, mask in self.groups:
            first, last = max(start, queries.start), min(start + count, queries.stop)
            if first < last:
                rows = slice(first - start, last - start)
                run = slice(first - queries.start, last - queries.start)
                yield run, None if mask is None else _cut(mask, rows, keys, heads)
            start += count


def _cut(mask: Tensor, rows: slice, keys: slice, heads: slice) -> Tensor:
    assert mask.ndim == 4, f"a mask has 4 dimensions, this one is {tuple(mask.shape)}"
    if mask.shape[1] > 1:
        mask = mask[:, heads]
    if mask.shape[2] > 1:
        mask = mask[:, :, rows]
    return mask[..., keys]


def attend_masked(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: SelfAttentionMask | None,
    queries: slice,
    keys: slice,
    heads: slice,
) -> Tensor:
    """Attention of a range of queries over a range of keys, mask piece by mask piece. Empty ranges give empty results.

    query: (B, T, H, E) with T = queries' length; key, value: (B, S, H, E) with S = keys' length. Returns (B, T, H, E).
    """
    if query.numel() == 0:
        return torch.empty_like(query)
    if mask is None:
        return attend(query, key, value, None)
    outs = [attend(query[:, run], key, value, piece) for run, piece in mask.pieces(queries, keys, heads)]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def attend_masked_with_lse(
    attend: AttendWithLse,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: SelfAttentionMask | None,
    queries: slice,
    keys: slice,
    heads: slice,
) -> tuple[Tensor, Tensor]:
    """As `attend_masked`, with the log-sum-exp (B, H, T)."""
    if mask is None or query.numel() == 0:
        return attend(query, key, value, None)
    parts = [attend(query[:, run], key, value, piece) for run, piece in mask.pieces(queries, keys, heads)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=2)
