"""Train the demo checkpoint: `python -m rayltx.demo.train --output shapes.safetensors`.

A LTX-Video transformer (`diffusers`' class, six blocks of width 128) learns flow matching on synthetic clips, with the
objective of LTX-Video itself: x_sigma = (1 - sigma) x_0 + sigma noise, and the model predicts noise - x_0
(arXiv 2501.00103, section 2.3). The result is written in the official format: parameter names as Lightricks' files
have them, and their `config` metadata. A few hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rayltx.demo.clips import COLOURS, MOTIONS, SHAPES, Scene, render_clip
from rayltx.demo.pixels import SPREAD, pixels_to_latent
from rayltx.demo.prompts import CONTEXT_DIM, scene_context
from rayltx.demo.vae import CHECKPOINT, MODEL_VERSION, official_config, official_tensors
from rayltx.diffusion_models.lightricks.checkpoint import OFFICIAL_PREFIX
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape, video_positions
from rayltx.whole_files import appearing_whole

NUM_HEADS, HEAD_DIM, NUM_LAYERS, CHANNELS = 4, 32, 6, 128
FRAME_RATE = 24.0
SCENES = [Scene(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS]
# Latent (frames, height, width), each with the clips rendered per scene.
BUCKETS = [((6, 8, 8), 20), ((6, 6, 6), 40), ((5, 5, 8), 20), ((5, 8, 5), 20), ((4, 7, 7), 20)]

TRANSFORMER_CONFIG = {
    "_class_name": "Transformer3DModel",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": NUM_HEADS,
    "attention_head_dim": HEAD_DIM,
    "cross_attention_dim": NUM_HEADS * HEAD_DIM,
    "caption_channels": CONTEXT_DIM,
    "num_layers": NUM_LAYERS,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "positional_embedding_type": "rope",
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "timestep_scale_multiplier": 1000,
    "causal_temporal_positioning": True,
}
OFFICIAL_NAMES = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}


def build_model() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=NUM_HEADS * HEAD_DIM,
        caption_channels=CONTEXT_DIM,
        num_layers=NUM_LAYERS,
    )


def render_bucket(
    size: tuple[int, int, int], clips_per_scene: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Latents (clips, C, f, h, w) float16 and the index in SCENES of each clip."""
    frames, height, width = size
    latents, indices = [], []
    for index, scene in enumerate(SCENES):
        for _ in range(clips_per_scene):
            clip = render_clip(scene, 8 * (frames - 1) + 1, 32 * height, 32 * width, generator)
            latents.append(pixels_to_latent(clip).half())
            indices.append(index)
    return torch.stack(latents), torch.tensor(indices)


def save_official(model: LTXVideoTransformer3DModel, path: Path, vae: AutoencoderKLLTXVideo | None = None) -> None:
    """Write the weights under their official names, with the metadata that model detection needs. The VAE's as float16."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for theirs, official in OFFICIAL_NAMES.items():
            name = name.replace(theirs, official)
        tensors[OFFICIAL_PREFIX + name] = tensor.float().contiguous()
    config: dict[str, Any] = {"transformer": TRANSFORMER_CONFIG}
    if vae is not None:
        config["vae"] = official_config()
        tensors |= {name: tensor.half().contiguous() for name, tensor in official_tensors(vae).items()}
    with appearing_whole(path) as temporary:  # it may be the file that was begun with
        save_file(tensors, temporary, metadata={"config": json.dumps(config), "model_version": MODEL_VERSION})


def load_official(model: LTXVideoTransformer3DModel, path: Path) -> None:
    """The weights of a checkpoint that `save_official` wrote: the inverse of its renaming."""
    tensors = {}
    for name, tensor in load_file(path).items():
        if not name.startswith(OFFICIAL_PREFIX):
            continue
        name = name.removeprefix(OFFICIAL_PREFIX)
        for theirs, official in OFFICIAL_NAMES.items():
            name = name.replace(official, theirs)
        tensors[name] = tensor
    model.load_state_dict(tensors)


def optimiser_of(
    model: nn.Module, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """AdamW on one cycle. learning_rate: its peak."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=learning_rate, total_steps=steps, pct_start=0.05
    )


def move_average(average: nn.Module, model: nn.Module, step: int, most: float) -> None:
    """An exponential moving average of the weights. most: of what was there that is kept, when it has run for long."""
    decay = min(most, step / (step + 20))
    with torch.no_grad():
        for kept, current in zip(average.parameters(), model.parameters()):
            kept.lerp_(current, 1.0 - decay)


def train(output: Path, steps: int, batch_size: int, seed: int, learning_rate: float, resume: Path | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    started = time.monotonic()
    data = [render_bucket(size, count, generator) for size, count in BUCKETS]
    print(f"{sum(len(latents) for latents, _ in data)} clips in {time.monotonic() - started:.0f} s", flush=True)

    context, mask = (torch.cat(parts) for parts in zip(*(scene_context(scene) for scene in SCENES)))
    empty_context, empty_mask = scene_context(None)
    model = build_model()
    if resume:
        load_official(model, resume)
    average = copy.deepcopy(model)  # exponential moving average of the weights: less noisy than the last step's
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimiser, schedule = optimiser_of(model, learning_rate, steps)
    weights = torch.tensor([float(len(latents)) for latents, _ in data])

    # What a channel weighs in the picture, tempered: the fine detail should not go unlearnt.
    channel_weight = (SPREAD / SPREAD.mean()).clamp(0.25, 4.0)
    running = 0.0
    for step in range(1, steps + 1):
        latents, indices = data[int(torch.multinomial(weights, 1, generator=generator))]
        chosen = torch.randint(len(latents), (batch_size,), generator=generator)
        x0 = latents[chosen].float().flatten(2).transpose(1, 2)  # (B, tokens, C)
        shape = LatentShape(*latents.shape[2:])
        positions = video_positions(shape, FRAME_RATE, causal=True)[..., 0][None].expand(batch_size, -1, -1)

        scene_index = indices[chosen]
        batch_context, batch_mask = context[scene_index].clone(), mask[scene_index].clone()
        dropped = torch.rand(batch_size, generator=generator) < 0.1  # for classifier-free guidance
        batch_context[dropped], batch_mask[dropped] = empty_context, empty_mask

        # Logit-normal, shifted towards noise, where the layout of the clip is decided.
        sigma = torch.sigmoid(torch.randn(batch_size, generator=generator) * 1.2 + 0.8)
        noise = torch.randn(x0.shape, generator=generator)
        x_sigma = torch.lerp(x0, noise, sigma[:, None, None])
        velocity = model(x_sigma, batch_context, sigma * 1000.0, batch_mask, video_coords=positions, return_dict=False)[
            0
        ]
        loss = ((velocity - (noise - x0)).square() * channel_weight).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        move_average(average, model, step, 0.999)
        running += loss.item()
        if step % 100 == 0:
            print(f"step {step}: loss {running / 100:.4f}, {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0
        if step % 1000 == 0 or step == steps:
            save_official(average, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="the peak of the one-cycle schedule")
    parser.add_argument("--resume", type=Path, help="start from the weights of this checkpoint")
    arguments = parser.parse_args()
    train(
        arguments.output,
        arguments.steps,
        arguments.batch_size,
        arguments.seed,
        arguments.learning_rate,
        arguments.resume,
    )


if __name__ == "__main__":
    main()
