"""The demo's checkpoint: its VAE, and that its clips show what was asked for."""

from __future__ import annotations

import logging

import pytest
import torch
from embedded_host import load_host

from rayltx.demo.clips import BACKGROUND, COLOURS, MOTIONS, render_clip
from rayltx.demo.pixels import latent_to_pixels, pixels_to_latent
from rayltx.demo.prompts import PROMPTS, scene_context
from rayltx.demo.vae import CHECKPOINT, KNOWN_LATENTS, check_options, decode
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.sampling import initial_noise, sample, schedule
from rayltx.sequence_parallel.group import SequenceParallelGroup


@pytest.mark.parametrize("name", PROMPTS)
def test_the_vae_draws_what_its_latents_hold(name):
    """Of latents that are not exact, as no sampled ones are, closer than the transform that they come from."""
    generator = torch.Generator().manual_seed(3)
    clip = render_clip(PROMPTS[name], 17, 192, 192, generator)
    exact = pixels_to_latent(clip)
    noisy = exact + 0.3 * torch.randn(exact.shape, generator=generator)
    errors = [(decode(latent[None]) - clip).square().mean() for latent in (exact, noisy)]
    assert errors[0] < 0.01
    assert errors[1] < 0.5 * (latent_to_pixels(noisy) - clip).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_a_clip_shows_what_was_asked_for(name):
    frames = shown(name)
    colour = torch.tensor(COLOURS[PROMPTS[name].colour])
    weights = (frames - torch.tensor(BACKGROUND)).square().sum(-1)  # (F, H, W): where something is
    centres = torch.stack([centre_of(frame) for frame in weights])  # (F, 2): x, y
    moved = centres[-1] - centres[0]
    direction = torch.tensor(MOTIONS[PROMPTS[name].motion])
    assert moved @ direction > 0.3 * frames.shape[1]
    assert abs(moved @ direction) > 4 * abs(moved @ direction.flip(0))
    middle = frames[len(frames) // 2][weights[len(frames) // 2] > 0.5 * weights[len(frames) // 2].max()]
    nearest = min(COLOURS, key=lambda other: (middle.mean(0) - torch.tensor(COLOURS[other])).norm())
    assert nearest == PROMPTS[name].colour, (middle.mean(0), colour)


def shown(name: str) -> torch.Tensor:
    """The clip of a named prompt, (F, H, W, 3)."""
    shape = LatentShape(*KNOWN_LATENTS)
    host = load_host(CHECKPOINT)
    sides = [
        {"context": context, "context_mask": mask, "frame_rate": 24.0}
        for context, mask in (scene_context(PROMPTS[name]), scene_context(None))
    ]
    noise = initial_noise({"video": (1, 128, *KNOWN_LATENTS)}, 0)
    group = SequenceParallelGroup.single()
    latents = sample(
        lambda inputs: host.forward(group, inputs),
        noise,
        schedule(20, shape.num_tokens),
        *sides,
        1.5,
        stochastic_seed=1,
    )
    return decode(latents["video"])


def centre_of(weights: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.meshgrid(*(torch.arange(float(size)) for size in weights.shape), indexing="ij")
    return torch.stack([(weights * columns).sum(), (weights * rows).sum()]) / weights.sum()


def test_a_clip_that_is_too_large_for_it_is_said_to_be(caplog):
    with caplog.at_level(logging.WARNING, "rayltx"):
        check_options(LatentShape(*KNOWN_LATENTS))
        assert not caplog.records
        check_options(LatentShape(*(size + 1 for size in KNOWN_LATENTS)))
    assert "was trained on clips of up to" in caplog.text
