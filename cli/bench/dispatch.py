"""`rayltx bench dispatch`: what it costs to have a step done elsewhere, by a step of a model that does nothing."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayltx.cli.bench.answering_host import ANSWERING_HOST
from rayltx.cli.bench.measurements import Clock, Measurement
from rayltx.cli.bench.report import Output, at_least, in_turn, reporting
from rayltx.demo.vae import CHECKPOINT
from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.remote_model import RemoteModel
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.sequence_parallel.partition import ParallelConfig

_SMALL = LatentShape.from_pixels(1280, 704, 121)
_LARGE = LatentShape.from_pixels(1920, 1088, 897)
_TEXT = (1, 1024, 3840)  # of LTX-2's encoder, float32


@dataclass(frozen=True)
class DispatchOptions:
    workers: int
    steps: int  # a round
    rounds: int


def run_dispatch(options: DispatchOptions, output: Output) -> None:
    """Print. Raises InputError."""
    at_least(workers=(options.workers, 1), steps=(options.steps, 1), rounds=(options.rounds, 1))
    with reporting("dispatch", vars(options), output, options.workers) as report:
        with Cluster.start(ClusterRequest(workers=options.workers)) as cluster:
            remote = cluster.load(open_checkpoint(CHECKPOINT), None, host=ANSWERING_HOST)
            asking = _Asking(remote, ParallelConfig(options.workers), options.steps)
            small, large = ({"latent": _latent(shape)} for shape in (_SMALL, _LARGE))
            kinds: dict[str, dict[str, Tensor]] = {
                "nothing": {},
                f"a latent of {_megabytes(small)}": small,
                f"and a text of {_megabytes({'context': torch.zeros(_TEXT)})}, which stays": {
                    **small,
                    "context": torch.randn(_TEXT, generator=torch.Generator().manual_seed(0)),
                },
                f"a latent of {_megabytes(large)}": large,
            }
            arms = in_turn(
                {name: functools.partial(asking.milliseconds, sent) for name, sent in kinds.items()}, options.rounds
            )
        report.measurements.append(Measurement("a step of a model that does nothing", "ms", Clock.WALL, arms))
        report.found["every answer is what was sent"] = asking.all_came_back
        report.remarks.append(
            f"each sample is the median of {options.steps} steps; the latent, new in each, also comes back"
        )


class _Asking:
    def __init__(self, remote: RemoteModel, config: ParallelConfig, steps: int) -> None:
        self._remote, self._config, self._steps = remote, config, steps
        self.all_came_back = True
        self._latents = 0  # that were sent

    def milliseconds(self, tensors: dict[str, Tensor]) -> float:
        """The median of the steps."""
        times = []
        for _ in range(self._steps):
            sent: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors.items()}  # a step makes them anew
            if "latent" in sent:
                self._latents += 1
                sent["latent"].view(torch.int16).fill_(self._latents % 2**14)  # finite, and another for as many steps
            started = time.perf_counter()
            answer = self._remote.forward(sent, self._config, poll=lambda: None)
            times.append(time.perf_counter() - started)
            self.all_came_back &= answer.keys() == sent.keys() - {"context"}
            self.all_came_back &= all(torch.equal(tensor, sent[name]) for name, tensor in answer.items())
        return statistics.median(times) * 1e3


def _latent(shape: LatentShape) -> Tensor:
    return torch.zeros(1, 128, shape.frames, shape.height, shape.width, dtype=torch.bfloat16)


def _megabytes(tensors: dict[str, Tensor]) -> str:
    return f"{sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.2g} MB"
