"""`rayltx generate`: the main job, on the embedded host."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from rayltx.about import ROOT
from rayltx.cli.cluster_options import ClusterOptions
from rayltx.cli.conditioning import load_conditioning
from rayltx.cli.interrupts import check_interrupted
from rayltx.cli.outputs import check_outputs, write_output
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.diffusion_models.lightricks.feed_forward import CHUNKS_OPTION
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.diffusion_models.lightricks.sampling import initial_noise, parse_sigmas, sample, schedule
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import InputError
from rayltx.expansion.comfyui_gguf.checkpoint import GGUFCheckpoint, open_model_file
from rayltx.sequence_parallel.partition import ParallelConfig

DEMO_CHECKPOINT = ROOT / "demo" / "shapes.safetensors"
DEMO_PIXELS = "rayltx-dct-8x32x32"  # in the demo checkpoint's config: how its latents become pixels
DEFAULT_PROMPT = "red-circle-right"
_SEEDS = 2**64  # how many there are, in ComfyUI too

OnStep = Callable[[int, dict[str, Tensor]], None]

console = Console(stderr=True)


@dataclass(frozen=True)
class GenerateOptions:
    checkpoint: Path | None
    prompt: str | None
    conditioning: Path | None
    width: int
    height: int
    frames: int
    frame_rate: float
    steps: int
    sigmas: str | None
    cfg: float
    seed: int
    chunks: int
    dtype: str
    outputs: list[Path]
    verify: bool
    comfyui: Path | None
    cluster: ClusterOptions


def run_generate(options: GenerateOptions) -> None:
    """Check everything that can be checked, then start workers, load, sample and write."""
    shape = LatentShape.from_pixels(options.width, options.height, options.frames)
    if not 0 < options.frame_rate < math.inf:
        raise InputError(f"frame-rate={options.frame_rate} must be a positive number")
    if not math.isfinite(options.cfg):
        raise InputError(f"cfg={options.cfg} must be a number")
    if not 0 <= options.seed < _SEEDS:
        raise InputError(f"seed={options.seed} must be from 0 to {_SEEDS - 1}")
    if options.chunks < 0:
        raise InputError(f"chunks={options.chunks} must be 0 (automatic) or more")
    checkpoint = open_model_file(options.checkpoint or DEMO_CHECKPOINT)
    is_demo = checkpoint.config.get("pixel_mapping") == DEMO_PIXELS
    check_outputs(options.outputs, has_pixels=is_demo)
    positive, negative = _conditioning(options, is_demo)
    request, config = options.cluster.resolve()
    generate = _in_comfyui if options.comfyui else _embedded
    latents, sigmas = generate(options, checkpoint, shape, positive, negative, request, config)
    _write(options, latents, is_demo, sigmas)


def _noise(options: GenerateOptions, shape: LatentShape, channels: int, has_audio: bool) -> dict[str, Tensor]:
    shapes: dict[str, Sequence[int]] = {"video": (1, channels, shape.frames, shape.height, shape.width)}
    if has_audio:
        shapes["audio"] = (1, 8, shape.audio_tokens(options.frame_rate), 16)
    return initial_noise(shapes, options.seed)


def _embedded(
    options: GenerateOptions,
    checkpoint: Checkpoint,
    shape: LatentShape,
    positive: dict[str, Any],
    negative: dict[str, Any] | None,
    request: ClusterRequest,
    config: ParallelConfig,
) -> tuple[dict[str, Tensor], Tensor]:
    """On diffusers' model."""
    # Imported here, not above: diffusers takes seconds, and the errors before this line should not.
    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel

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
    noise = _noise(options, shape, model.channels, "audio_context" in positive)
    common = {"feed_forward_chunks": options.chunks}
    sides = {**positive, **common}, None if negative is None else {**negative, **common}
    with Cluster.start(request) as cluster:
        with _progress("starting the workers") as (bar, task):
            cluster.workers()
        config = cluster.group.with_shares(config)
        with _progress(f"loading {Path(checkpoint.path).name}") as (bar, task):
            remote = cluster.load(
                checkpoint,
                spec,
                host,
                dtypes,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )

        def sample_on(config: ParallelConfig, on_step: OnStep) -> dict[str, Tensor]:
            forward = functools.partial(remote.forward, config=config)
            return sample(forward, noise, sigmas, *sides, options.cfg, on_step, config.row_groups > 1)

        return _sample(sample_on, config, shape, len(sigmas) - 1, options.verify), sigmas


def _in_comfyui(
    options: GenerateOptions,
    checkpoint: Checkpoint,
    shape: LatentShape,
    positive: dict[str, Any],
    negative: dict[str, Any] | None,
    request: ClusterRequest,
    config: ParallelConfig,
) -> tuple[dict[str, Tensor], Tensor]:
    """On ComfyUI's model, by its sampler."""
    from rayltx.comfy_dist.main_process.headless import comfyui_cluster, comfyui_schedule, sample_with_comfyui

    assert options.comfyui is not None
    weight_dtype = {"file": "default", "bfloat16": "bf16", "float16": "fp16"}.get(options.dtype)
    if weight_dtype is None:
        raise InputError(f"dtype={options.dtype} is not one that ComfyUI's loader takes; use file, bfloat16 or float16")
    with comfyui_cluster(options.comfyui, request) as cluster:
        from rayltx.comfy_dist.main_process.placement import Placement
        from rayltx.comfy_dist.main_process.twin import LoadOptions, load_twin

        with _progress("starting the workers") as (bar, task):
            cluster.workers()
        with _progress(f"loading {Path(checkpoint.path).name}") as (bar, task):
            twin = load_twin(
                checkpoint.path,
                Placement(cluster.request, config),
                LoadOptions(weight_dtype),
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        noise = _noise(options, shape, twin.model.diffusion_model.in_channels, "audio_context" in positive)
        sigmas = parse_sigmas(options.sigmas) if options.sigmas else comfyui_schedule(options.steps, noise["video"])
        twin.model_options["transformer_options"][CHUNKS_OPTION] = options.chunks

        def sample_on(config: ParallelConfig, on_step: OnStep) -> dict[str, Tensor]:
            return sample_with_comfyui(
                twin.with_config(config), noise, sigmas, positive, negative, options.cfg, on_step
            )

        return _sample(sample_on, config, shape, len(sigmas) - 1, options.verify), sigmas


def _sample(
    sample_on: Callable[[ParallelConfig, OnStep], dict[str, Tensor]],
    config: ParallelConfig,
    shape: LatentShape,
    steps: int,
    verify: bool,
) -> dict[str, Tensor]:
    """Sample with progress; and again on one worker, to print the difference."""

    def timed(config: ParallelConfig) -> tuple[dict[str, Tensor], float]:
        with _progress(f"sampling on {_describe(config)}", total=steps) as (bar, task):
            started = time.monotonic()

            def on_step(step: int, latents: dict[str, Tensor]) -> None:
                check_interrupted()
                bar.update(task, completed=step)

            latents = sample_on(config, on_step)
            return latents, time.monotonic() - started

    latents, seconds = timed(config)
    console.print(f"{steps} steps of {shape.num_tokens} tokens on {_describe(config)}: {seconds:.1f} s")
    if verify:
        alone, seconds = timed(ParallelConfig())
        console.print(f"the same on 1 worker: {seconds:.1f} s")
        for name, latent in latents.items():
            difference = relative_error(latent, alone[name])
            print(
                f"{name}: {_describe(config)} differ from 1 worker by {difference:.2e} (norm of the difference / norm)"
            )
    return latents


def _conversions(checkpoint: Checkpoint, dtype: str) -> dict[str, torch.dtype]:
    """What to convert so that all is computed in one dtype. dtype: a name of torch's, or "file"."""
    if dtype == "file":
        return {}
    wanted: torch.dtype = getattr(torch, dtype)
    infos = checkpoint.tensors.items()
    return {name: wanted for name, info in infos if info.dtype.is_floating_point and info.dtype != wanted}


def _conditioning(options: GenerateOptions, is_demo: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if options.prompt is not None and options.conditioning is not None:
        raise InputError("prompt and conditioning are two ways to say the same; give one of them")
    if options.conditioning is not None:
        positive, negative = load_conditioning(options.conditioning)
    elif is_demo:
        from rayltx.demo.prompts import parse_prompt, scene_context

        context, mask = scene_context(parse_prompt(DEFAULT_PROMPT if options.prompt is None else options.prompt))
        empty_context, empty_mask = scene_context(None)
        positive = {"context": context, "context_mask": mask}
        negative = {"context": empty_context, "context_mask": empty_mask}
    else:
        raise InputError(
            "this checkpoint needs text conditioning from a file (--conditioning): there is no text encoder here; the "
            "prompts are the demo checkpoint's"
        )
    if options.cfg != 1.0 and negative is None:
        raise InputError(
            f"cfg={options.cfg} needs negative conditioning, and {options.conditioning} has none; add it, or use cfg=1"
        )
    frame_rate = {"frame_rate": options.frame_rate}
    return {**positive, **frame_rate}, None if negative is None else {**negative, **frame_rate}


def _describe(config: ParallelConfig) -> str:
    if config.world_size == 1:
        return "1 worker"
    return f"{config.world_size} workers ({config})"


def _write(options: GenerateOptions, latents: dict[str, Tensor], is_demo: bool, sigmas: Tensor) -> None:
    clip = None
    if is_demo:
        from rayltx.demo.pixels import latent_to_pixels

        clip = latent_to_pixels(latents["video"][0])
    about = {
        "prompt": options.prompt or (DEFAULT_PROMPT if is_demo and not options.conditioning else ""),
        "seed": str(options.seed),
        "cfg": str(options.cfg),
        "sigmas": ",".join(f"{sigma:.6g}" for sigma in sigmas.tolist()),
        "frame_rate": str(options.frame_rate),
    }
    for path in options.outputs:
        write_output(path, latents, clip, options.frame_rate, about)
        print(path)


@contextmanager
def _progress(description: str, total: float | None = None) -> Iterator[tuple[Progress, Any]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar, bar.add_task(description, total=total)
