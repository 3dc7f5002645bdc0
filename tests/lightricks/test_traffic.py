"""Bytes and collectives of a layer, counted at the collective calls, against the least that Ulysses can move."""

import dataclasses

import pytest
import torch
from embedded_host import load_host

from rayltx.cli.bench.traffic import counted_traffic
from rayltx.diffusion_models.lightricks.exactness import CASES
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.roles import AttentionRole
from rayltx.diffusion_models.lightricks.sharded_attention import ShardedSequence
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig
from rayltx.sequence_parallel.self_attention import head_groups

# LTX-2: 32 heads of 128 for video, of 64 for audio; 1024 text tokens; 25 audio tokens a second.
HEADS, VIDEO_WIDTH, AUDIO_WIDTH, TEXT_TOKENS = 32, 128, 64, 1024
SHAPE = LatentShape.from_pixels(1280, 704, 121)
AUDIO_TOKENS = 126


def layer_traffic(world_size, groups):
    """One LTX-2 layer's six attentions at full size on this rank. The kernel's arithmetic is left out, not its shapes.

    groups: of heads; 0: by the shape.
    """
    group = dataclasses.replace(SequenceParallelGroup.create(ParallelConfig(world_size, 1)), head_groups=groups)
    sequence = ShardedSequence.of(group, SHAPE.num_tokens)

    def tensor(tokens, width):
        return torch.zeros(1, tokens, HEADS, width, dtype=torch.bfloat16)

    video, video_narrow = tensor(sequence.num_local, VIDEO_WIDTH), tensor(sequence.num_local, AUDIO_WIDTH)
    audio, text = tensor(AUDIO_TOKENS, AUDIO_WIDTH), tensor(TEXT_TOKENS, VIDEO_WIDTH)
    audio_text = tensor(TEXT_TOKENS, AUDIO_WIDTH)
    calls = [
        (AttentionRole.VIDEO_SELF, video, video),
        (AttentionRole.VIDEO_TEXT, video, text),
        (AttentionRole.AUDIO_SELF, audio, audio),
        (AttentionRole.AUDIO_TEXT, audio, audio_text),
        (AttentionRole.AUDIO_TO_VIDEO, video_narrow, audio),
        (AttentionRole.VIDEO_TO_AUDIO, audio, video_narrow),
    ]
    with counted_traffic() as traffic:
        for role, query, key in calls:
            out = sequence.attend(role, query, key, key, lambda q, k, v, mask: torch.zeros_like(q))
            assert out.shape == query.shape
    return traffic.received_bytes, traffic.collectives


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_layer_moves_at_most_1_05_times_the_minimum(ranks, world_size):
    # Query, key, value and output, each an n x D bf16 tensor of which (W - 1) / W comes from elsewhere.
    local = SHAPE.num_tokens / world_size
    minimum = 4 * local * HEADS * VIDEO_WIDTH * 2 * (world_size - 1) / world_size
    by_shape = head_groups(SHAPE.num_tokens, 1, HEADS // world_size)
    assert by_shape > 1
    for groups in (1, 0):
        for received, collectives in ranks.run(world_size, layer_traffic, world_size, groups):
            print(
                f"W={world_size}: {received / 2**20:.1f} MiB, {received / minimum:.3f} of the minimum, {collectives} "
                f"collectives in {groups or by_shape} groups"
            )
            assert received <= 1.05 * minimum
            assert collectives <= 4 * (groups or by_shape) + (1 if world_size == 2 else 2)


def model_traffic(path, layers):
    host = load_host(path)
    group = SequenceParallelGroup.create(ParallelConfig(2, 1))
    with counted_traffic() as traffic:
        host.forward(group, CASES[1].inputs(host.model))
    return traffic.collectives


@pytest.mark.parametrize("version, a_layer", [("LTX-Video", 4), ("LTX-2", 5)])
def test_the_model_makes_no_other_collectives(ranks, tmp_path, version, a_layer):
    path = tmp_path / "model.safetensors"
    layers = 3
    save_tiny_checkpoint(path, version, layers=layers)
    once = 1  # the answer is collected
    assert ranks.run(2, model_traffic, str(path), layers) == [a_layer * layers + once] * 2
