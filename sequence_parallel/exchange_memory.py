"""What sharing a self-attention takes of a rank's memory, besides what the attention of as many tokens takes by itself."""

from __future__ import annotations

from rayltx.sequence_parallel.partition import ParallelConfig

_ULYSSES_COPIES = 6  # of query, key and value: as they are sent, and as they arrive
_RING_COPIES = 5  # of key and value: here and arriving; and one part's output
_RING_SUMS = 2  # in float32: of the outputs so far, and of the one that is added
_SUM_BYTES = 4


def exchange_bytes(config: ParallelConfig, num_tokens: int, batch: int, width: int, element_bytes: int) -> int:
    """The most bytes that a rank's buffers take at once, in one self-attention.

    num_tokens: of the whole sequence. width: of all heads together. element_bytes: of the dtype that is exchanged.
    """
    elements = max(config.token_sizes(num_tokens).sizes) * batch * width
    ulysses = _ULYSSES_COPIES * element_bytes if config.ulysses_degree > 1 else 0
    ring = _RING_COPIES * element_bytes + _RING_SUMS * _SUM_BYTES if config.ring_degree > 1 else 0
    # The ring begins when what was sent is gone, and what has arrived is not.
    return elements * max(ulysses, ring + ulysses // 2)
