"""`rayltx bench shard`: what ranks compute together of what one computes alone, and what the plan says of it.

Efficiency is T1 / (W T_rank): one rank's time for all of a forward, over W times the slowest rank's for its part. On the CPU
time is the computing thread's own, so that the link, and who else runs, are left out; on GPUs it is between events. ComfyUI's own
forward, where it is ComfyUI's model, says what one rank costs beside it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rayltx.cli.bench.measurements import Arm, Clock, Measurement
from rayltx.cli.bench.ranks import event_seconds, on_ranks, slowest, thread_seconds
from rayltx.cli.bench.report import Output, at_least, in_turn, reporting
from rayltx.cli.bench.small_models import SmallModel, exact_and_error
from rayltx.devices import CPU, automatic, kind_of
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.step_cost import TEXT_TOKENS, StepCost
from rayltx.errors import DeviceError
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

_OWN, _ALONE, _PART = "ComfyUI's own, all of it", "one rank, all of it", "the slowest rank's part"


@dataclass(frozen=True)
class ShardOptions:
    model: str
    workers: int
    rounds: int
    width: int
    height: int
    frames: int
    layers: int
    device: str  # auto, cpu, cuda
    comfyui: Path | None


def run_shard(options: ShardOptions, output: Output) -> None:
    """Print. Raises InputError, DeviceError and MissingPackageError."""
    at_least(workers=(options.workers, 2), rounds=(options.rounds, 1), layers=(options.layers, 1))
    device = automatic() if options.device == "auto" else options.device
    if options.device == "auto" and kind_of(device).count() < options.workers:
        device = CPU
    if device != CPU and kind_of(device).count() < options.workers:
        raise DeviceError(
            f"workers={options.workers}: there are {kind_of(device).count()} {device} devices; use fewer workers, or "
            "--device cpu"
        )
    shape = LatentShape.from_pixels(options.width, options.height, options.frames)
    small = SmallModel(options.model, shape, TEXT_TOKENS, options.comfyui, device, layers=options.layers)
    small.check("bench shard")
    with reporting("shard", vars(options), output, options.workers, options.comfyui) as report:
        answers = on_ranks(_measure, options.workers, small, options.rounds, device=device)
        arms, is_exact, error = answers[0]
        clock = Clock.PROCESSOR if device == CPU else Clock.WALL
        host = "diffusers'" if options.comfyui is None else "ComfyUI's"
        what = f"a forward of a small {options.model}, {host}, {shape.num_tokens} video tokens"
        report.measurements.append(Measurement(what, "s", clock, arms))
        medians = {arm.name: arm.median for arm in arms}
        alone, part = medians[_ALONE], medians[_PART]
        if _OWN in medians:
            report.found["one rank over ComfyUI's own"] = alone / medians[_OWN]
        report.found |= compared_with_plan(small, options.workers, alone, part)
        report.found["the same bits as one rank"] = is_exact
        report.found["relative difference from one rank"] = error
        report.remarks.append(
            "the plan's are what it counts for this shape at the speed of one rank, without the link" if device == CPU else
            "times are between events on the GPUs, and have the link in them; the plan's have not"
        )  # fmt: skip


def compared_with_plan(small: SmallModel, ranks: int, alone_s: float, part_s: float) -> dict[str, float]:
    """Measured and planned efficiency, and by how many percent the plan's time of a rank is off."""

    def cost(config: ParallelConfig) -> StepCost:
        return StepCost.of(small.planned, small.shape.num_tokens, small.audio_tokens, config, keeps_text=True)

    flops_per_s = cost(ParallelConfig()).flops / alone_s
    planned_s = cost(ParallelConfig(ranks)).flops / flops_per_s
    return {
        "efficiency T1 / (W T_rank)": alone_s / (ranks * part_s),
        "efficiency, planned": alone_s / (ranks * planned_s),
        "a rank's time, planned, in seconds": planned_s,
        "deviation of the plan in percent": 100.0 * (planned_s / part_s - 1.0),
        "GFLOP/s of one rank": flops_per_s / 1e9,
    }


def _measure(group: SequenceParallelGroup, small: SmallModel, rounds: int) -> tuple[tuple[Arm, ...], bool, float]:
    """On every rank: the slowest's times. Whether the answer is one rank's is known to rank 0 alone."""
    forward = small.build()
    answers: dict[str, list[Tensor]] = {}

    def seconds(name: str, of: SequenceParallelGroup | None) -> float:
        def work() -> None:
            if of is group or group.rank == 0:
                answers[name] = forward(of)

        dist.barrier()
        taken = thread_seconds(work) if small.device == CPU else event_seconds(small.device, work)
        return slowest(taken, small.device)

    on: dict[str, SequenceParallelGroup | None] = {_ALONE: SequenceParallelGroup.single(), _PART: group}
    if small.comfyui is not None:
        on[_OWN] = None
    with torch.inference_mode():
        arms = in_turn({name: functools.partial(seconds, name, of) for name, of in on.items()}, rounds)
    if group.rank != 0:
        return arms, True, 0.0
    return arms, *exact_and_error(answers[_PART], answers[_ALONE])
