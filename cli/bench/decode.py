"""`rayltx bench decode`: what a rank's part of a decode takes of what one rank takes for all of it.

Each rank has one thread. The first rank alone, while the others wait, in turn with all together, by slabs; the slowest counts.
The VAE is small, of ComfyUI's real class, with random weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rayltx.cli.bench.measurements import Arm, Clock, Measurement
from rayltx.cli.bench.ranks import on_ranks, slowest
from rayltx.cli.bench.report import Output, at_least, in_turn, reporting
from rayltx.cli.bench.small_models import enter_comfyui
from rayltx.comfy_dist.comfy_environment import check_comfyui
from rayltx.comfy_dist.tiny_vaes import VIDEO_VAES, video_vae_model
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup

# Heads as wide as the real one's: with narrower ones the masks of its windows, one for all heads, would take most of the time.
_DECODERS = {"diffusion": {"head_dim": 64, "stage_channels": [512, 256, 128, 128, 64]}}


@dataclass(frozen=True)
class DecodeOptions:
    kind: str
    workers: int
    rounds: int
    width: int
    height: int
    frames: int
    comfyui: Path


def run_decode(options: DecodeOptions, output: Output) -> None:
    """Print. Raises InputError, also for what so many ranks do not decode together."""
    at_least(workers=(options.workers, 2), rounds=(options.rounds, 1))
    if options.kind not in VIDEO_VAES:
        raise InputError(f'kind="{options.kind}" must be one of {", ".join(VIDEO_VAES)}')
    shape = LatentShape.from_pixels(options.width, options.height, options.frames)
    check_comfyui(options.comfyui)
    with reporting("decode", vars(options), output, options.workers, options.comfyui) as report:
        measured = on_ranks(_measure, options.workers, options, shape)[0]
        for clock in (Clock.PROCESSOR, Clock.WALL):
            what = f"a decode of {shape.frames} x {shape.height} x {shape.width} by {options.kind}, {clock.value} time"
            report.measurements.append(Measurement(what, "s", clock, tuple(measured[clock])))
        report.found["relative difference of the first rank's part"] = measured["error"]


def _measure(group: SequenceParallelGroup, options: DecodeOptions, shape: LatentShape) -> dict[object, object]:
    """By clock the arms; the difference is known to rank 0 alone."""
    enter_comfyui(options.comfyui)
    from rayltx.diffusion_models.lightricks.comfyui_decoder import Slabs, decode_slab
    from rayltx.diffusion_models.lightricks.relative_error import relative_error

    model = video_vae_model(options.kind, _DECODERS.get(options.kind, {}))
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 128, shape.frames, shape.height, shape.width, generator=generator)
    slabs = Slabs.of(model, latent.shape, group)
    if isinstance(slabs, str):
        raise InputError(f"workers={options.workers}: this latent is not decoded by so many together: {slabs}")
    wall: dict[str, list[float]] = {"one rank, all of it": [], "the slowest rank's part": []}
    answers: dict[str, Tensor | None] = {}

    def timed(name: str, work: Callable[[], Tensor | None]) -> Callable[[], float]:
        def seconds() -> float:
            torch.manual_seed(0)  # of what some VAEs draw
            dist.barrier()
            processor, began = time.process_time(), time.monotonic()
            answers[name] = work()
            taken, passed = time.process_time() - processor, time.monotonic() - began
            wall[name].append(slowest(passed))
            return slowest(taken)

        return seconds

    def alone() -> Tensor | None:
        return model.decode(latent) if group.rank == 0 else None

    def together() -> Tensor | None:
        return decode_slab(model, latent, slabs, group)

    with torch.inference_mode():
        processor_arms = in_turn(
            {name: timed(name, work) for name, work in zip(wall, (alone, together))}, options.rounds
        )
    one, part = answers.values()
    same_part = one if one is None or part is None else one.narrow(slabs.dim, 0, part.shape[slabs.dim])
    return {
        Clock.PROCESSOR: processor_arms,
        Clock.WALL: [Arm(name, tuple(samples[1:])) for name, samples in wall.items()],  # the first one warms up
        "error": 0.0 if same_part is None or part is None else relative_error(part, same_part),
    }
