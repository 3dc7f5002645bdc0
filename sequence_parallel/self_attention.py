"""Self-attention of a sequence that no rank holds whole: Ulysses, ring, or both.

A rank's heads travel in groups: one is attended to while the next is on its way, and its outputs leave at once. So the
link is waited for at the first group and at the last, however long it takes in between.

Letters in shapes: B batch, n tokens of this rank, N tokens of its chunk, H heads, E head width.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.local_attention import Attend, AttendWithLse, attention_with_lse
from rayltx.sequence_parallel.masks import SelfAttentionMask, attend_masked
from rayltx.sequence_parallel.partition import Partition, TokenPartition
from rayltx.sequence_parallel.ring import ring_attention
from rayltx.sequence_parallel.ulysses import (
    PendingExchange,
    PendingGather,
    all_gather_tokens,
    gathered_heads,
    start_gather_heads,
    start_scatter_heads,
)

# What is waited for is then a quarter of the way of keys and of outputs; each collective costs by itself, too.
_MOST_GROUPS = 4
# What keeps a GPU busy: kernels take the queries of a head in blocks of 128, and a large card has 128 multiprocessors.
_QUERY_BLOCK = 128
_LEAST_BLOCKS = 128


def head_groups(num_tokens: int, batch: int, num_heads: int) -> int:
    """In how many groups a rank's heads travel, so that attention to a group fills a device.

    num_tokens: that are attended to at once. num_heads: of the rank that has the fewest.
    """
    blocks = -(-num_tokens // _QUERY_BLOCK) * batch * num_heads
    return max(1, min(_MOST_GROUPS, num_heads, blocks // _LEAST_BLOCKS))


@dataclass
class SentHeads:
    """A query, key or value on its way, by groups of heads."""

    groups: deque[PendingExchange | Tensor]

    def next(self) -> Tensor:
        """What has arrived of the next group: (B, N, h, E). Nothing keeps it here."""
        group = self.groups.popleft()
        return group.wait() if isinstance(group, PendingExchange) else group


class SelfAttentionExchange:
    """The exchange around one self-attention.

    A rank hands in its slices of value, query and key as soon as each is computed (`send`), so that one travels while
    the next is projected, and then asks for its slice of the attention (`attend`).
    Collective: all ranks of the group do the same, in the same order.
    """

    def __init__(
        self,
        group: SequenceParallelGroup,
        partition: TokenPartition,
        num_heads: int,
        batch: int = 1,
        in_groups: bool = True,
    ) -> None:
        """in_groups: False if the kernel has to be shown all heads of a rank at once."""
        self._group = group
        self._partition = partition
        self._tokens = Partition(partition.chunk_sizes(group.ring_rank))
        self._heads = group.config.head_sizes(num_heads)
        count = 1
        if in_groups and group.ulysses is not None and group.ring is None:
            fewest = min(self._heads.sizes)
            count = min(group.head_groups or head_groups(self._tokens.total, batch, fewest), max(1, fewest))
        self._groups = self._heads.subdivided(count)

    def send(self, x_local: Tensor) -> SentHeads:
        """x_local: (B, n, H, E). Returns a handle for `attend`."""
        ulysses = self._group.ulysses
        if ulysses is None:
            return SentHeads(deque([x_local]))
        return SentHeads(deque(start_scatter_heads(x_local, self._tokens, heads, ulysses) for heads in self._groups))

    def attend(
        self,
        query: SentHeads,
        key: SentHeads,
        value: SentHeads,
        attend: Attend,
        attend_with_lse: AttendWithLse = attention_with_lse,
        mask: SelfAttentionMask | None = None,
        mergeable: bool = True,
        queries_together: bool = False,
    ) -> Tensor:
        """Attention of this rank's tokens over all tokens.

        attend: the host's kernel, used wherever a rank sees all keys at once.
        attend_with_lse: used in the ring, whose parts are merged.
        mask: of the whole sequence.
        mergeable: False if `attend` is not the plain attention that parts can be merged into; a ring then gathers the
        keys, and `attend` sees them all.
        queries_together: if not mergeable either, a ring gathers the queries, too, and keeps the answers to its own.
        Returns (B, n, H, E), of the query's dtype.
        """
        group, chunks = self._group, self._partition.chunks
        whole = slice(0, chunks.total)
        leaving: list[PendingGather] = []
        for heads_by_rank in self._groups:
            heads = heads_by_rank[group.ulysses_rank]
            q, k, v = query.next(), key.next(), value.next()
            if group.ring is None:
                out = attend_masked(attend, q, k, v, mask, whole, whole, heads)
            elif not mergeable:
                k, v = (all_gather_tokens(x, chunks, group.ring) for x in (k, v))
                queries = chunks.slice(group.ring_rank)
                if queries_together:
                    q = all_gather_tokens(q, chunks, group.ring)
                    out = attend_masked(attend, q, k, v, mask, whole, whole, heads)[:, queries].contiguous()
                else:
                    out = attend_masked(attend, q, k, v, mask, queries, whole, heads)
            else:
                out = ring_attention(q, k, v, chunks, group.ring, attend_with_lse, mask, heads)
            del q, k, v  # the way back needs memory, too
            if group.ulysses is None:
                return out
            leaving.append(start_gather_heads(out, self._tokens, heads_by_rank, group.ulysses))
        return gathered_heads(leaving, out, self._tokens.sizes[group.ulysses_rank], self._heads.total)
