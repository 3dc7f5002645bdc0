"""What both hosts do for `rayltx generate`: start from noise, show progress, sample again to compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from rayltx.cli.interrupts import check_interrupted
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.diffusion_models.lightricks.sampling import initial_noise
from rayltx.sequence_parallel.partition import ParallelConfig

OnStep = Callable[[int, dict[str, Tensor]], None]
_AUDIO_CHANNELS, _AUDIO_BINS = 8, 16  # of LTX-2's audio latents and later ones'

console = Console(stderr=True)


def noise_for(shape: LatentShape, channels: int, frame_rate: float, seed: int, has_audio: bool) -> dict[str, Tensor]:
    """Standard normal noise of a clip, (1, channels, f, h, w) as "video" and, of sound, (1, 8, tokens, 16) as "audio"."""
    shapes: dict[str, Sequence[int]] = {"video": (1, channels, shape.frames, shape.height, shape.width)}
    if has_audio:
        shapes["audio"] = (1, _AUDIO_CHANNELS, shape.audio_tokens(frame_rate), _AUDIO_BINS)
    return initial_noise(shapes, seed)


class Stages:
    """What is going on, shown while it does; and how long each part took."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, description: str, total: float | None = None) -> Iterator[tuple[Progress, TaskID]]:
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        started = time.monotonic()
        with Progress(*columns, console=console, transient=True) as bar:
            yield bar, bar.add_task(description, total=total)
        self._seconds[description] = time.monotonic() - started

    def told(self) -> str:
        """One line of all that is over."""
        return ", ".join(f"{description} {seconds:.1f} s" for description, seconds in self._seconds.items())


def sample_and_compare(
    sample_on: Callable[[ParallelConfig, OnStep], dict[str, Tensor]],
    config: ParallelConfig,
    shape: LatentShape,
    steps: int,
    verify: bool,
    stages: Stages,
) -> dict[str, Tensor]:
    """Sample with progress; and again on one worker, to print the difference."""

    def sampled(config: ParallelConfig) -> dict[str, Tensor]:
        with stages.stage(f"sampling on {describe(config)}", total=steps) as (bar, task):

            def on_step(step: int, latents: dict[str, Tensor]) -> None:
                check_interrupted()
                bar.update(task, completed=step)

            return sample_on(config, on_step)

    latents = sampled(config)
    console.print(f"{steps} steps of {shape.num_tokens} tokens")
    if verify:
        alone = sampled(ParallelConfig())
        for name, latent in latents.items():
            difference = relative_error(latent, alone[name])
            print(
                f"{name}: {describe(config)} differ from 1 worker by {difference:.2e} (norm of the difference / norm)"
            )
    return latents


def describe(config: ParallelConfig) -> str:
    if config.world_size == 1:
        return "1 worker"
    return f"{config.world_size} workers ({config})"
