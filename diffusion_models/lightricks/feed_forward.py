"""The feed-forward a few tokens at a time.

Its inner activation is 4 times the model's width for every token, the largest of a forward by far: 3.7 GB for 57,000
tokens of LTX-2 in bfloat16. Tokens do not meet in it, so slices of the sequence give the same numbers, and the peak
falls by the number of slices.
Source: the idea is Reformer's, arXiv 2001.04451, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MIN_CHUNK_TOKENS = 512  # with fewer rows, matrix products take another path, and sum in another order
CHUNK_MULTIPLE = 64
# In place of a number of chunks: by the number of tokens,
AUTOMATIC = 0  # of every feed-forward, as someone has asked for;
SAVING = -1  # of those that no patch can look at all tokens in;
UNASKED = -2  # and of these where no layer makes its weight anew at each call.
AUTOMATIC_INNER_BYTES = 64 * 2**20  # 2048 tokens of LTX-2 in bfloat16, large matrices still
# The key in ComfyUI's transformer options under which a model says in how many chunks.
CHUNKS_OPTION = "rayltx_feed_forward_chunks"


def chunk_tokens(num_tokens: int, chunks: int) -> int:
    """Tokens in a chunk, for at most `chunks` chunks: a multiple of 64, at least 512."""
    length = -(-num_tokens // max(chunks, 1))
    return max(MIN_CHUNK_TOKENS, -(-length // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


def automatic_chunks(num_tokens: int, width: int, element_bytes: int) -> int:
    """As few chunks as keep the inner activation under 64 MiB. width: times the rows of the batch."""
    return max(1, -(-num_tokens * 4 * width * element_bytes // AUTOMATIC_INNER_BYTES))


def chunked_feed_forward(feed_forward: Callable[[Tensor], Tensor], x: Tensor, chunks: int) -> Tensor:
    """`feed_forward(x)` in slices of the token dimension.

    x: (B, T, D), any float dtype. chunks: how many at most; AUTOMATIC chooses, 1 does it at once.
    Returns (B, T, D), allocated once.
    """
    num_tokens = x.shape[1]
    if chunks == AUTOMATIC:
        chunks = automatic_chunks(num_tokens, x.shape[0] * x.shape[2], x.element_size())
    length = chunk_tokens(num_tokens, chunks)
    if chunks == 1 or length >= num_tokens:
        return feed_forward(x)
    out = torch.empty_like(x)
    count, rest = divmod(num_tokens, length)
    count += rest >= MIN_CHUNK_TOKENS  # fewer go with the last
    for number in range(count):
        tokens = slice(number * length, num_tokens if number == count - 1 else (number + 1) * length)
        # Contiguous: of a strided batch, torch adds the bias in a step of its own, and rounds once more.
        out[:, tokens] = feed_forward(x[:, tokens].contiguous())
    return out
