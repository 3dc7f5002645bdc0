"""`rayltx generate` on diffusers' transformer."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayltx.cli.generate_options import GenerateOptions, Sides
from rayltx.cli.generated import Generated
from rayltx.cli.outputs import Outputs
from rayltx.cli.sampling_runs import OnStep, Stages, noise_for, sample_and_compare
from rayltx.demo.vae import decode, is_demo
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.sampling import parse_sigmas, sample, schedule
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.expansion.comfyui_gguf.checkpoint import GGUFCheckpoint
from rayltx.sequence_parallel.partition import ParallelConfig


def generate_on_diffusers(
    options: GenerateOptions,
    checkpoint: Checkpoint,
    shape: LatentShape,
    sides: Sides,
    request: ClusterRequest,
    config: ParallelConfig,
    stages: Stages,
    outputs: Outputs,
) -> Generated:
    positive, negative = sides
    model = DiffusersModel.of_checkpoint(checkpoint)
    spec: Any = model
    host, dtypes = "", _conversions(checkpoint, options.dtype)
    if isinstance(checkpoint, GGUFCheckpoint):
        from rayltx.expansion.comfyui_gguf.diffusers_host import HOST, QuantisedModel

        # Blocks have no dtype to compute in.
        default = "float32" if request.on_cpu else "bfloat16"
        spec = QuantisedModel.of_checkpoint(
            checkpoint, getattr(torch, default if options.dtype == "file" else options.dtype)
        )
        host, dtypes = HOST, spec.dtypes
    checkpoint.check_values()
    for side in (positive, negative or {}):
        model.check_context(side.get("context"), side.get("audio_context"))
    sigmas = parse_sigmas(options.sigmas) if options.sigmas else schedule(options.steps, shape.num_tokens)
    noise = noise_for(shape, model.channels, options.frame_rate, options.seed, "audio_context" in positive)
    common = {"feed_forward_chunks": options.chunks}
    both = {**positive, **common}, None if negative is None else {**negative, **common}
    with Cluster.start(request) as cluster:
        with stages.stage("starting the workers"):
            cluster.workers()
        config = cluster.group.with_shares(config)
        with stages.stage(f"loading {Path(checkpoint.path).name}") as (bar, task):
            remote = cluster.load(
                checkpoint,
                spec,
                host,
                dtypes,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )

        def sample_on(config: ParallelConfig, on_step: OnStep) -> dict[str, Tensor]:
            forward = functools.partial(remote.forward, config=config)
            in_one_batch = config.row_groups > 1
            return sample(forward, noise, sigmas, *both, options.cfg, on_step, in_one_batch, options.stochastic_seed)

        latents = sample_and_compare(sample_on, config, shape, len(sigmas) - 1, options.verify, stages)
    made = Generated(latents, sigmas)
    outputs.write_latents(made)
    if options.wants_pixels and is_demo(checkpoint):
        with outputs.saving_latents(made), stages.stage("decoding"):
            made = dataclasses.replace(made, clip=decode(latents["video"], Path(checkpoint.path)))
    return made


def _conversions(checkpoint: Checkpoint, dtype: str) -> dict[str, torch.dtype]:
    """What to convert so that all is computed in one dtype. dtype: a name of torch's, or "file"."""
    if dtype == "file":
        return {}
    wanted: torch.dtype = getattr(torch, dtype)
    infos = checkpoint.tensors.items()
    return {name: wanted for name, info in infos if info.dtype.is_floating_point and info.dtype != wanted}
