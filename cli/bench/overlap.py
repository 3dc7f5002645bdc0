"""`rayltx bench overlap`: how much of the link's time is hidden behind a rank's work.

Two ranks of one thread each run a forward, and really exchange through gloo. Time is counted in each rank's own processor
time, and the link's is added by a model (`modelled_link`). Its speed is chosen so that all of a forward's exchanges, one after
the other, take a given part of its work. "Hidden" is the part of these that a forward is not longer by than one over a link
without limits right before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rayltx.cli.bench.measurements import Arm, Clock, Measurement
from rayltx.cli.bench.modelled_link import Link, on
from rayltx.cli.bench.ranks import on_ranks, slowest
from rayltx.cli.bench.report import Output, at_least, reporting
from rayltx.cli.bench.small_models import SmallModel
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup

_RANKS = 2
_TEXT_TOKENS = 128
_MOST_COLLECTIVES = 4096
# In how many groups heads travel, and whether ComfyUI's attention is sent part by part. diffusers' always is.
_ARMS = {"waited for": (1, False), "in groups": (4, False), "in groups, as projected": (4, True)}
Samples = dict[float, dict[str, list[float]]]  # what is exposed, by the link over the work, and the arm


@dataclass(frozen=True)
class OverlapOptions:
    model: str
    links: Sequence[float]  # each: all exchanges over all work
    rounds: int
    width: int
    height: int
    frames: int
    comfyui: Path | None


def parse_links(text: str) -> list[float]:
    """Numbers above 0 from "0.1,0.2", in order. Raises InputError."""
    try:
        links = sorted({float(part) for part in text.split(",")})
    except ValueError:
        links = []
    if not links or not all(0 < link < math.inf for link in links):
        raise InputError(f'links="{text}" must be numbers above 0 separated by commas, such as 0.1,0.2')
    return links


def run_overlap(options: OverlapOptions, output: Output) -> None:
    """Print. Raises InputError and MissingPackageError."""
    at_least(rounds=(options.rounds, 1))
    shape = LatentShape.from_pixels(options.width, options.height, options.frames)
    small = SmallModel(options.model, shape, _TEXT_TOKENS, options.comfyui)
    small.check("bench overlap")
    with reporting("overlap", vars(options), output, _RANKS, options.comfyui) as report:
        posted = torch.zeros(_RANKS, _MOST_COLLECTIVES, dtype=torch.float64).share_memory_()
        answers = on_ranks(_measure, _RANKS, small, list(options.links), options.rounds, posted)
        for link in options.links:
            arms = []
            for name in answers[0][link]:
                by_rank = [Arm(name, tuple(100.0 * (1.0 - each) for each in answer[link][name])) for answer in answers]
                arms.append(min(by_rank, key=lambda arm: arm.median))  # the rank that waits most
            what = f"hidden of a link that takes {link:g} of the work"
            report.measurements.append(Measurement(what, "%", Clock.PROCESSOR, tuple(arms), has_ratios=False))


def _measure(
    group: SequenceParallelGroup, small: SmallModel, links: list[float], rounds: int, posted: Tensor
) -> Samples:
    """On every rank: the share of the link's time that its forward is longer by."""
    forward = small.build()
    link = Link(group.rank, posted)
    arms = {name: arm for name, arm in _ARMS.items() if small.comfyui is not None or not arm[1]}

    def seconds(arm: tuple[int, bool], bytes_per_s: float) -> float:
        dist.barrier()
        link.restart(bytes_per_s)
        forward(dataclasses.replace(group, head_groups=arm[0]), arm[1])
        return link.now()

    exposed: Samples = {part: defaultdict(list) for part in links}
    with torch.inference_mode(), on(link):
        whole = [slowest(min(seconds(arm, math.inf) for _ in range(3))) for arm in arms.values()]
        work_s, moved = whole[0], link.bytes  # both ranks take the link for equally fast
        for _ in range(rounds):
            for name, arm in arms.items():
                for part in links:
                    alone = seconds(arm, math.inf)
                    longer = seconds(arm, moved / (part * work_s)) - alone
                    exposed[part][name].append(longer / (part * work_s))
    return {part: dict(samples) for part, samples in exposed.items()}
