"""The XFuser samplers: ComfyUI's own sampling on a twin, with Raylight's inputs."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_types import Conditioning, Guider, Latent, Model, Sampler
from rayltx.comfy_dist.main_process.comfy_nodes import CUSTOM_SAMPLING, call_node
from rayltx.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingRange:
    """The part of a schedule that one pass samples, as KSampler (Advanced) names it."""

    start_at_step: int = 0
    end_at_step: int = 10000
    denoise: float = 1.0
    return_with_leftover_noise: bool = False

    def of(self, sigmas: Tensor) -> Tensor:
        """The pass's own sigmas, out of all of them.

        sigmas: (S + 1,), falling. denoise below 1 keeps the last round(S * denoise) steps, and the range counts within
        them. Without leftover noise, the last sigma is 0.
        Returns as many as there are; fewer than two when there is nothing to sample.
        """
        if self.denoise < 1.0:
            sigmas = sigmas[len(sigmas) - 1 - round((len(sigmas) - 1) * self.denoise) :]
        sigmas = sigmas[self.start_at_step : self.end_at_step + 1].clone()
        if len(sigmas) > 1 and not self.return_with_leftover_noise:
            sigmas[-1] = 0.0
        return sigmas


def sample_scheduled(
    model: Model,
    add_noise: bool,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent: Latent,
    sampling_range: SamplingRange,
    sigmas: Tensor | None = None,
) -> Latent:
    """Sample with one of ComfyUI's schedulers, as its KSampler does, or on sigmas that were made elsewhere.

    Returns the LATENT. Raises InputError for sigmas that are none.
    """
    if sigmas is None:
        out = importlib.import_module("nodes").common_ksampler(
            model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent, denoise=sampling_range.denoise,
            disable_noise=not add_noise, start_step=sampling_range.start_at_step, last_step=sampling_range.end_at_step,
            force_full_denoise=not sampling_range.return_with_leftover_noise,
        )  # fmt: skip
        return out[0]
    if sigmas.ndim != 1 or not torch.isfinite(sigmas).all():
        raise InputError(
            f"sigmas of shape {tuple(sigmas.shape)} must be a list of finite numbers, such as LTXVScheduler's"
        )
    if steps != len(sigmas) - 1:
        logger.warning("steps=%d is not used: the sigmas that are connected make %d steps", steps, len(sigmas) - 1)
    chosen = sampling_range.of(sigmas)
    if len(chosen) < 2:
        return latent  # as ComfyUI does for a range without a step
    sampler = call_node(CUSTOM_SAMPLING, "KSamplerSelect", sampler_name=sampler_name)[0]
    return sample_custom(model, add_noise, seed, cfg, positive, negative, sampler, chosen, latent)


def sample_custom(
    model: Model,
    add_noise: bool,
    seed: int,
    cfg: float,
    positive: Conditioning,
    negative: Conditioning,
    sampler: Sampler,
    sigmas: Tensor,
    latent: Latent,
) -> Latent:
    """ComfyUI's SamplerCustom. Returns the LATENT. The sigmas stay as they are: some samplers write into theirs."""
    return call_node(
        CUSTOM_SAMPLING, "SamplerCustom", model=model, add_noise=add_noise, noise_seed=seed, cfg=cfg, positive=positive,
        negative=negative, sampler=sampler, sigmas=sigmas.clone(), latent_image=latent,
    )[0]  # fmt: skip


def sample_guided(
    guider: Guider, add_noise: bool, seed: int, sampler: Sampler, sigmas: Tensor, latent: Latent
) -> tuple[Latent, Latent]:
    """ComfyUI's SamplerCustomAdvanced. Returns its two LATENTs. The sigmas stay as they are, as above."""
    noise = (
        call_node(CUSTOM_SAMPLING, "RandomNoise", noise_seed=seed)[0]
        if add_noise
        else call_node(CUSTOM_SAMPLING, "DisableNoise")[0]
    )
    return call_node(
        CUSTOM_SAMPLING, "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, latent_image=latent,
        sigmas=sigmas.clone(),
    )[:2]  # fmt: skip
