"""Self-attention of a sequence that no rank holds whole: Ulysses, ring, or both.

Letters in shapes: B batch, n tokens of this rank, H heads, E head width.
"""

from __future__ import annotations

from torch import Tensor

from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.local_attention import Attend, AttendWithLse, attention_with_lse
from rayltx.sequence_parallel.masks import SelfAttentionMask, attend_masked
from rayltx.sequence_parallel.partition import Partition, TokenPartition
from rayltx.sequence_parallel.ring import ring_attention
from rayltx.sequence_parallel.ulysses import (
    PendingExchange,
    all_gather_tokens,
    gather_heads,
    start_scatter_heads,
)


class SelfAttentionExchange:
    """The exchange around one self-attention.

    A rank hands in its slices of value, query and key as soon as each is computed (`send`), so that one travels while
    the next is projected, and then asks for its slice of the attention (`attend`).
    Collective: all ranks of the group do the same, in the same order.
    """

    def __init__(self, group: SequenceParallelGroup, partition: TokenPartition, num_heads: int) -> None:
        self._group = group
        self._partition = partition
        self._tokens = Partition(partition.chunk_sizes(group.ring_rank))
        self._heads = Partition.even(num_heads, group.config.ulysses_degree)

    def send(self, x_local: Tensor) -> PendingExchange | Tensor:
        """x_local: (B, n, H, E). Returns a handle for `attend`."""
        if self._group.ulysses is None:
            return x_local
        return start_scatter_heads(x_local, self._tokens, self._heads, self._group.ulysses)

    def attend(
        self,
        query: PendingExchange | Tensor,
        key: PendingExchange | Tensor,
        value: PendingExchange | Tensor,
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
        query, key, value = (x.wait() if isinstance(x, PendingExchange) else x for x in (query, key, value))
        group, chunks = self._group, self._partition.chunks
        heads = self._heads.slice(group.ulysses_rank)
        whole = slice(0, chunks.total)
        if group.ring is None:
            out = attend_masked(attend, query, key, value, mask, whole, whole, heads)
        elif not mergeable:
            key, value = (all_gather_tokens(x, chunks, group.ring) for x in (key, value))
            queries = chunks.slice(group.ring_rank)
            if queries_together:
                query = all_gather_tokens(query, chunks, group.ring)
                out = attend_masked(attend, query, key, value, mask, whole, whole, heads)[:, queries].contiguous()
            else:
                out = attend_masked(attend, query, key, value, mask, queries, whole, heads)
        else:
            out = ring_attention(query, key, value, chunks, group.ring, attend_with_lse, mask, heads)
        if group.ulysses is None:
            return out
        del query, key, value  # the way back needs memory, too
        return gather_heads(out, self._tokens, self._heads, group.ulysses)
