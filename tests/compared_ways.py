"""The ways of `rayltx bench compare`, with numbers: run by ranks."""

import torch

from rayltx.cli.bench.compare import OURS, WAYS
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig


def answers(num_tokens, num_text, ranks):
    """By way, this rank's part of the layer's answer, without padding; and one rank's. float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 4096, generator=generator) / 64
    whole, text = (torch.randn(1, tokens, 4096, generator=generator) for tokens in (num_tokens, num_text))
    group = SequenceParallelGroup.create(ParallelConfig(ranks))
    most = -(-num_tokens // ranks)
    padded = torch.nn.functional.pad(whole, (0, 0, 0, ranks * most - num_tokens))
    parts = {
        OURS: whole[:, group.config.token_sizes(num_tokens).slice(group.rank)],
        "padded": padded[:, group.rank * most : (group.rank + 1) * most],
    }
    found = {name: way(group, num_tokens, parts.get(name, parts["padded"]), text, weight) for name, way in WAYS.items()}
    found["alone"] = WAYS[OURS](SequenceParallelGroup.single(), num_tokens, whole, text, weight)
    return found
