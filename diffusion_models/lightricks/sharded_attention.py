"""What each kind of LTX attention needs when every rank holds a slice of the video tokens, and all text and audio.

Letters in shapes: B batch, n video tokens of this rank, N video tokens, H heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayltx.diffusion_models.lightricks.roles import AttentionRole
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.local_attention import Attend
from rayltx.sequence_parallel.masks import SelfAttentionMask
from rayltx.sequence_parallel.partition import TokenPartition
from rayltx.sequence_parallel.self_attention import SelfAttentionExchange
from rayltx.sequence_parallel.sharded_keys import attention_over_sharded_keys
from rayltx.sequence_parallel.ulysses import all_gather_tokens


@dataclass(frozen=True)
class ShardedSequence:
    """One forward's sequence as one rank sees it."""

    group: SequenceParallelGroup
    partition: TokenPartition
    self_attention_mask: SelfAttentionMask | None = None

    @classmethod
    def of(
        cls, group: SequenceParallelGroup, num_tokens: int, self_attention_mask: SelfAttentionMask | None = None
    ) -> ShardedSequence:
        """Cut the tokens over the group's ranks, by their shares."""
        return cls(group, TokenPartition.of(num_tokens, group.config), self_attention_mask)

    @property
    def local(self) -> slice:
        """This rank's tokens."""
        return self.partition.local(self.group.rank)

    @property
    def num_local(self) -> int:
        return self.local.stop - self.local.start

    def self_exchange(self, num_heads: int, batch: int, in_groups: bool = True) -> SelfAttentionExchange:
        """For video self-attention: the one exchange whose bytes cannot be avoided."""
        return SelfAttentionExchange(self.group, self.partition, num_heads, batch, in_groups)

    def attend(
        self,
        role: AttentionRole,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attend: Attend,
        mask: Tensor | None = None,
        mergeable: bool = True,
        queries_together: bool = False,
        in_groups: bool = True,
    ) -> Tensor:
        """Any attention of a block, from what this rank holds.

        query, key, value: (B, tokens, H, E). Video tokens are this rank's, text and audio tokens are all.
        mask: broadcastable to (B, H, queries, keys) of the whole attention: its video side is cut here. Video
        self-attention takes the sequence's mask instead.
        mergeable: False if `attend` is more than plain attention, so that parts of it cannot be merged. Then keys are
        gathered where parts would have been.
        in_groups: False if `attend` has to be shown all heads of this rank at once.
        queries_together: `attend` has to be shown all queries of a self-attention, since one's answer depends on the others.
        Returns (B, queries, H, E). Collective for VIDEO_SELF and VIDEO_TO_AUDIO.
        """
        if role is AttentionRole.VIDEO_SELF:
            assert mask is None, "the mask of video self-attention belongs to the sequence"
            exchange = self.self_exchange(query.shape[2], query.shape[0], in_groups)
            sent_value, sent_query, sent_key = exchange.send(value), exchange.send(query), exchange.send(key)
            return exchange.attend(
                sent_query, sent_key, sent_value, attend,
                mask=self.self_attention_mask, mergeable=mergeable, queries_together=queries_together,
            )  # fmt: skip
        if role is AttentionRole.VIDEO_TO_AUDIO:
            whole_mask = mask
            if mask is not None and mask.shape[-1] == self.partition.num_tokens:
                mask = mask[..., self.local]
            if self.group.world is None:
                return attend_some(attend, query, key, value, mask)
            if not mergeable:
                key, value = (all_gather_tokens(x, self.partition.tokens, self.group.world) for x in (key, value))
                return attend_some(attend, query, key, value, whole_mask)
            return attention_over_sharded_keys(query, key, value, self.group, mask_local=mask)
        if mask is not None and role in (AttentionRole.VIDEO_TEXT, AttentionRole.AUDIO_TO_VIDEO):
            if mask.ndim >= 2 and mask.shape[-2] == self.partition.num_tokens > 1:
                mask = mask[..., self.local, :]
        return attend_some(attend, query, key, value, mask)


def attend_some(attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`attend`, or zeros where there is no query or no key: kernels crash on empty inputs, or return NaN."""
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query)
    return attend(query, key, value, mask)
