"""Train the demo's VAE for a trained transformer: `python -m rayltx.demo.train_vae --output FILE`.

The latents are those that the transformer was trained on: 128 low frequencies of every block (`rayltx.demo.pixels`). The
encoder learns to give them; the decoder learns the clip that they were taken from, which they hold but for its edges, and
also from latents as the transformer leaves them: its estimate of x_0 from a noisy clip, x_sigma - sigma v. What it draws
so has the edges that every clip of this small world has, and not the ringing of a cut cosine series.
The file is written whole: transformer and VAE, as LTX-Video's one-file checkpoints are. Under an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from torch import Tensor

from rayltx.demo.clips import render_clip
from rayltx.demo.pixels import pixels_to_latent
from rayltx.demo.prompts import scene_context
from rayltx.demo.train import (
    FRAME_RATE,
    SCENES,
    build_model,
    load_official,
    move_average,
    optimiser_of,
    save_official,
)
from rayltx.demo.vae import CHECKPOINT, build_vae, load_vae
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape, video_positions

CROP = (3, 3, 3)  # latents
_CROPS_OF_A_CLIP = 2
SIZES = [(4, 6, 6), (5, 6, 6), (4, 8, 8), (4, 5, 8), (4, 8, 5)]  # latent (frames, height, width) of the clips


def draw(generator: torch.Generator) -> tuple[int, Tensor, Tensor]:
    """A random clip: the index of its scene, pixels (3, F, H, W) in [-1, 1], latent (C, f, h, w)."""
    frames, height, width = SIZES[int(torch.randint(len(SIZES), (), generator=generator))]
    scene = int(torch.randint(len(SCENES), (), generator=generator))
    clip = render_clip(SCENES[scene], 8 * (frames - 1) + 1, 32 * height, 32 * width, generator)
    return scene, clip.permute(3, 0, 1, 2) * 2.0 - 1.0, pixels_to_latent(clip)


def as_sampled(
    transformer: LTXVideoTransformer3DModel, latent: Tensor, scene: int, generator: torch.Generator
) -> Tensor:
    """The latent (C, f, h, w) as the transformer estimates it from a noisy one."""
    shape = LatentShape(*latent.shape[1:])
    positions = video_positions(shape, FRAME_RATE, causal=True)[..., 0][None]
    context, mask = scene_context(SCENES[scene])
    sigma = 0.05 + 0.65 * torch.rand((), generator=generator)
    x0 = latent.flatten(1).T[None]
    noisy = torch.lerp(x0, torch.randn(x0.shape, generator=generator), sigma)
    with torch.no_grad():
        velocity = transformer(noisy, context, sigma[None] * 1000.0, mask, video_coords=positions, return_dict=False)[0]
    return (noisy - sigma * velocity)[0].T.unflatten(1, latent.shape[1:])


def crop(pixels: Tensor, latents: list[Tensor], generator: torch.Generator) -> tuple[Tensor, list[Tensor], bool]:
    """The same random part of a clip and of its latents; and whether it begins with the clip.

    Elsewhere the first of its pixel frames is the last of those that its first latents hold.
    """
    starts = [
        int(torch.randint(size - part + 1, (), generator=generator)) for size, part in zip(latents[0].shape[1:], CROP)
    ]
    inside = tuple(slice(start, start + part) for start, part in zip(starts, CROP))
    frames = slice(8 * starts[0], 8 * (starts[0] + CROP[0] - 1) + 1)
    rows, columns = (slice(32 * part.start, 32 * part.stop) for part in inside[1:])
    return (
        pixels[:, frames, rows, columns],
        [latent[:, inside[0], inside[1], inside[2]] for latent in latents],
        starts[0] == 0,
    )


def train(vae: AutoencoderKLLTXVideo, arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(arguments.seed)
    transformer = build_model()
    load_official(transformer, arguments.source)
    average = copy.deepcopy(vae)
    optimiser, schedule = optimiser_of(vae, arguments.learning_rate, arguments.steps)
    started = time.monotonic()
    encoded_loss = decoded_loss = 0.0
    for step in range(1, arguments.steps + 1):
        batch = []
        for number in range(arguments.batch_size // _CROPS_OF_A_CLIP):
            scene, clip, latent = draw(generator)
            sampled = as_sampled(transformer, latent, scene, generator)
            noisy = latent + 0.1 * torch.randn(latent.shape, generator=generator)
            for source in (sampled, noisy if (step + number) % 2 else sampled):
                pixels, (exact, given), from_the_start = crop(clip, [latent, source], generator)
                batch.append((pixels, exact, given, from_the_start))
        pixels, exact, given = (torch.stack(parts) for parts in list(zip(*batch))[:3])
        difference = vae.decode(given, return_dict=False)[0] - pixels
        decoded = difference.abs().mean()
        encoded = (vae.encode(pixels).latent_dist.mean - exact).square().mean((1, 3, 4))
        counted = torch.ones_like(encoded)
        counted[:, 0] = torch.tensor([float(from_the_start) for *_, from_the_start in batch])
        encoded = (encoded * counted).sum() / counted.sum()
        optimiser.zero_grad(set_to_none=True)
        # The square as well: by the absolute difference alone a picture of nothing but background is hard to leave.
        (decoded + 2.0 * difference.square().mean() + 0.1 * encoded).backward()
        torch.nn.utils.clip_grad_norm_(vae.encoder.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        move_average(average, vae, step, 0.995)
        decoded_loss, encoded_loss = decoded_loss + decoded.item(), encoded_loss + encoded.item()
        if step % 50 == 0:
            print(
                f"step {step}: decoded within {decoded_loss / 50:.4f}, encoded {encoded_loss / 50:.4f}, "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
            decoded_loss = encoded_loss = 0.0
        if step % 250 == 0 or step == arguments.steps:
            save_official(transformer, arguments.output, average)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=CHECKPOINT, help="the file with the trained transformer")
    parser.add_argument("--resume", type=Path, help="start from the VAE of this checkpoint")
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=6e-4, help="the peak of the one-cycle schedule")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    train(load_vae(arguments.resume) if arguments.resume else build_vae(), arguments)


if __name__ == "__main__":
    main()
