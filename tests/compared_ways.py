"""The ways of `rayltx bench compare`, with numbers: run by ranks."""

import dataclasses

import torch

from rayltx.cli.bench.compare import OURS, WAYS, LayerInput
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig


def answers(num_tokens, num_text, num_sound, ranks):
    """By way, this rank's part of the layer's video and sound; and one rank's. float32."""
    generator = torch.Generator().manual_seed(0)
    sizes = (
        (1, num_tokens, 4096), (1, num_text, 4096), (1, num_sound, 2048), (4096, 4096), (2048, 4096), (2048, 2048),
    )  # fmt: skip
    tensors = [torch.randn(*size, generator=generator) / (64 if size[0] > 1 else 1) for size in sizes]
    whole = LayerInput(num_tokens, *tensors)
    group = SequenceParallelGroup.create(ParallelConfig(ranks))
    most = -(-num_tokens // ranks)
    padded = torch.nn.functional.pad(whole.video, (0, 0, 0, ranks * most - num_tokens))
    own = whole.video[:, group.config.token_sizes(num_tokens).slice(group.rank)]
    parts = dict.fromkeys(WAYS, padded[:, group.rank * most : (group.rank + 1) * most]) | {OURS: own}
    found = {name: way(group, dataclasses.replace(whole, video=parts[name])) for name, way in WAYS.items()}
    found["alone"] = WAYS[OURS](SequenceParallelGroup.single(), whole)
    return found
