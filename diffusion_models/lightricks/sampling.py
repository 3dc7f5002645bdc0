"""Flow-matching sampling for the embedded host: schedule, noise and Euler steps.

In ComfyUI none of this is used: its own samplers run there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayltx.errors import InputError

# How much LTX shifts its schedule towards noise, by the number of tokens; ComfyUI's LTXVScheduler has the same.
BASE_TOKENS, MAX_TOKENS = 1024, 4096
BASE_SHIFT, MAX_SHIFT, TERMINAL = 0.95, 2.05, 0.1

Forward = Callable[[dict[str, Any]], dict[str, Tensor]]
"""Inputs of the model to {"video": velocity, ...}."""


def schedule(steps: int, num_tokens: int) -> Tensor:
    """LTX's sigmas: (steps + 1,) float32, from 1 to 0, shifted for the number of tokens.

    Source: Lightricks' scheduler, through diffusers' FlowMatchEulerDiscreteScheduler. Raises InputError for no steps.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler  # takes seconds, and ComfyUI's Python may not have it

    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1")
    if steps == 1:
        return torch.tensor([1.0, 0.0])  # stretching one sigma to the terminal value divides by zero
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=TERMINAL)
    sigmas = np.linspace(1.0, 1.0 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=BASE_SHIFT + slope * (num_tokens - BASE_TOKENS))
    return scheduler.sigmas


def parse_sigmas(text: str) -> Tensor:
    """Sigmas from "1.0, 0.75, 0": at least two, within [0, 1], falling. Raises InputError."""
    try:
        sigmas = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f'sigmas="{text}" must be numbers separated by commas ({error})') from error
    falling = all(later < earlier for earlier, later in pairwise(sigmas))
    if len(sigmas) < 2 or not falling or not 0.0 <= sigmas[-1] < sigmas[0] <= 1.0:
        raise InputError(f'sigmas="{text}" must be at least two falling numbers between 1 and 0')
    return torch.tensor(sigmas)


def initial_noise(shapes: dict[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """float32 noise for each latent, in order, from one generator on the CPU, as ComfyUI draws it."""
    return _drawn(shapes, torch.Generator().manual_seed(seed))


def _drawn(shapes: dict[str, Sequence[int]], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randn(tuple(shape), generator=generator) for name, shape in shapes.items()}


def sample(
    forward: Forward,
    noise: dict[str, Tensor],
    sigmas: Tensor,
    positive: dict[str, Any],
    negative: dict[str, Any] | None,
    cfg: float,
    on_step: Callable[[int, dict[str, Tensor]], None] | None = None,
    in_one_batch: bool = False,
    stochastic_seed: int | None = None,
) -> dict[str, Tensor]:
    """Euler steps down the sigmas, in float32.

    noise: {"video": (B, C, F, H, W)} and, for sound, {"audio": (B, 8, A, 16)}.
    positive, negative: conditioning as the model's inputs. negative is needed where cfg is not 1.
    on_step: called after each step with its number, from 1, and the latents.
    in_one_batch: ask for both conditionings in one call, if they have the same shapes.
    stochastic_seed: of new noise in each step in place of the noise that was there, drawn as `initial_noise` is; None: none.
    Source: arXiv 2210.02747; classifier-free guidance, arXiv 2207.12598; stochastic steps, arXiv 2303.01469, algorithm 1.
    """
    generator = None if stochastic_seed is None else torch.Generator().manual_seed(stochastic_seed)
    x = {name: latent * sigmas[0] for name, latent in noise.items()}
    batch = noise["video"].shape[0]
    conditionings = [positive]
    if cfg != 1.0:
        assert negative is not None, "classifier-free guidance needs negative conditioning"
        conditionings.append(negative)
    both = _as_rows(*conditionings) if in_one_batch and len(conditionings) == 2 else None
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas), start=1):
        latents = {"latent": x["video"], "timestep": sigma.expand(batch)}
        if "audio" in x:
            latents["audio_latent"] = x["audio"]
        if both is not None:
            answer = forward({**both, **{name: torch.cat([rows, rows]) for name, rows in latents.items()}})
            sides = [{name: rows.chunk(2)[side] for name, rows in answer.items()} for side in (0, 1)]
        else:
            sides = [forward({**side, **latents}) for side in conditionings]
        velocity = sides[0]
        if cfg != 1.0:
            velocity = {name: sides[1][name] + cfg * (sides[0][name] - sides[1][name]) for name in velocity}
        if generator is None:
            x = {name: x[name] + (next_sigma - sigma) * velocity[name].float() for name in x}
        else:
            clean = {name: x[name] - sigma * velocity[name].float() for name in x}
            new = _drawn({name: latent.shape for name, latent in clean.items()}, generator)
            x = {name: (1.0 - next_sigma) * clean[name] + next_sigma * new[name] for name in x}
        if on_step is not None:
            on_step(step, x)
    return x


def _as_rows(positive: dict[str, Any], negative: dict[str, Any]) -> dict[str, Any] | None:
    """The rows of both in one batch; None where they do not fit together."""
    if positive.keys() != negative.keys():
        return None
    both = {}
    for name, value in positive.items():
        other = negative[name]
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape:
            both[name] = torch.cat([value, other])
        elif not isinstance(value, Tensor) and not isinstance(other, Tensor) and value == other:
            both[name] = value
        else:
            return None
    return both
