"""What sharing a self-attention takes of a rank's memory, besides what the attention of as many tokens takes by itself."""

from __future__ import annotations

from rayltx.sequence_parallel.partition import ParallelConfig, TokenPartition

_ULYSSES_COPIES = 6  # of query, key and value: as they are sent, and as they arrive
_RING_COPIES = 5  # of key and value: here and arriving; and one part's output
_RING_SUMS = 2  # in float32: of the outputs so far, and of the one that is added
_SUM_BYTES = 4


def exchange_bytes(
    config: ParallelConfig, num_tokens: int, batch: int, num_heads: int, head_width: int, element_bytes: int
) -> int:
    """The most bytes that a rank's buffers take at once, in one self-attention.

    num_tokens: of the whole sequence. element_bytes: of the dtype that is exchanged.
    """
    groups = config.for_rows(batch)
    rows = batch // len(groups)
    return max(_of_one_group(group, num_tokens, rows, num_heads, head_width, element_bytes) for group in groups)


def _of_one_group(
    config: ParallelConfig, num_tokens: int, batch: int, num_heads: int, head_width: int, element_bytes: int
) -> int:
    tokens = TokenPartition.of(num_tokens, config)
    # A rank sends its tokens with all heads, and receives its chunk's with some.
    received = max(tokens.chunks.sizes) * max(config.head_sizes(num_heads).sizes)
    elements = max(max(tokens.tokens.sizes) * num_heads, received) * head_width * batch
    ulysses = _ULYSSES_COPIES * element_bytes if config.ulysses_degree > 1 else 0
    ring = _RING_COPIES * element_bytes + _RING_SUMS * _SUM_BYTES if config.ring_degree > 1 else 0
    # The ring begins when what was sent is gone, and what has arrived is not.
    return elements * max(ulysses, ring + ulysses // 2)
