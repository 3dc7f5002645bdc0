"""One GPU takes a step alone where several are no faster: a small video, or a slow link.

What the link takes of a step is known before it: counted from the shape (`step_cost`), at the speed that the first exchange
measured. Where one rank could be as fast if all of that is waited for, the step is timed on all ranks and on one, with the same
inputs, and the faster way is the one for this kind of step: from the first step of the first run on, and remembered, so that a
picture does not come out of one way today and of another tomorrow, whose last bits differ. Where a user has given shares or
`ulysses_degree`, all ranks work, and the log says where one would do as well.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rayltx.comfy_dist.comfy_types import DiffusionModel
from rayltx.comfy_dist.main_process.memory_estimate import Replicated
from rayltx.comfy_dist.model_spec import has_audio
from rayltx.diffusion_models.lightricks.comfyui_rows import batch_of
from rayltx.diffusion_models.lightricks.step_cost import ModelShape, StepCost, computing_s
from rayltx.diffusion_models.lightricks.step_plan import HIDDEN
from rayltx.distributed_worker.worker import LinkReport, WorkerInfo
from rayltx.errors import OutOfMemory, RanksFailedAlike, first_line
from rayltx.json_records import read_record, write_record
from rayltx.sequence_parallel.first_exchange import ExchangeReport
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

# Of a first step's time, which may be many times a later one's: what the link takes at least where more is looked into.
_LOOKED_INTO = 0.02
_TOLD_AT = 2  # the step of its kind

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class StepKind:
    """Steps that take alike long."""

    model: str  # which, and what it computes in
    shape: ModelShape
    streams: tuple[tuple[int, ...], ...]  # the latents' shapes
    video_tokens: int
    audio_tokens: int
    rows: int
    config: ParallelConfig
    devices: tuple[str, ...]  # of the ranks
    link: str  # what they talk over
    weight_budget: int  # bytes of weights on a device at most, the rest is streamed; 0: as many as fit

    @classmethod
    def of(
        cls,
        name: str,
        model: DiffusionModel,
        x: Tensor | list[Tensor],
        config: ParallelConfig,
        workers: Sequence[WorkerInfo],
        link: LinkReport,
        weight_budget: int = 0,
    ) -> StepKind:
        """x: as the model's forward takes it. workers: those of the ranks."""
        # Roughly, for it is measured anew at each start.
        speed = round(math.log2(link.exchange.bytes_per_s) / 2)
        machines = len({worker.hostname for worker in workers})
        streams = x if isinstance(x, (list, tuple)) else [x]
        return cls(
            name, shape_of(model), tuple(tuple(stream.shape) for stream in streams), streams[0][0, 0].numel(),
            Replicated.of(x, None).audio_tokens, batch_of(x), config, tuple(worker.device_description for worker in workers),
            f"{link.backend} on {machines} machine{'s' if machines > 1 else ''}, some 4^{speed} B/s", weight_budget,
        )  # fmt: skip

    def link_s(self, exchange: ExchangeReport, element_bytes: int) -> float:
        """That a step's exchanges take on all ranks, if nothing is computed meanwhile."""
        cost = self._cost(self.config)
        return cost.received_elements * element_bytes / exchange.bytes_per_s + cost.collectives * exchange.small_s

    def alone_s(self, shared_s: float, link_s: float, hidden: float) -> float:
        """That one rank takes, where all take `shared_s`. hidden: of the exchange, behind computing; with 0 it is the least."""
        ratio = self._cost(ParallelConfig()).flops / self._cost(self.config).flops
        return computing_s(shared_s, link_s, hidden) * ratio

    def _cost(self, config: ParallelConfig) -> StepCost:
        return StepCost.of(self.shape, self.video_tokens, self.audio_tokens, config, self.rows, keeps_text=True)

    def __str__(self) -> str:
        """The same for the same kind in another process."""
        return ", ".join(f"{field.name}: {getattr(self, field.name)!r}" for field in dataclasses.fields(self))


class RankChoice:
    """Of what is known about kinds of steps. path: of the file that remembers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._alone: dict[StepKind, bool] = {}
        self._seen: Counter[StepKind] = Counter()

    def step(
        self,
        kind: StepKind,
        exchange: ExchangeReport,
        element_bytes: int,
        compute: Callable[[bool], _Result],
        was_disturbed: Callable[[], bool] = lambda: False,
    ) -> _Result:
        """What `compute` gives: of a step, by one rank (True) or by all, whichever is faster.

        compute: may be called up to four times, for a kind that is not known. was_disturbed: whether something else than the
        steps took time meanwhile: then nothing is learnt of them.
        """
        if kind not in self._alone and (found := read_record(self._path).get(str(kind))) is not None:
            self._alone[kind] = found is True
        if kind in self._alone:
            return self._by_one(kind, compute) if self._alone[kind] else compute(False)
        answer, first_s = _timed(compute, False)
        link_s = kind.link_s(exchange, element_bytes)
        if link_s < _LOOKED_INTO * first_s:
            self._alone[kind] = False
            return answer
        answer, shared_s = _timed(compute, False)
        if was_disturbed():
            return answer
        if kind.alone_s(shared_s, link_s, hidden=0.0) >= shared_s:
            self._remember(kind, False)
            return answer
        try:
            _timed(compute, True)
            answer_alone, alone_s = _timed(compute, True)
        except (OutOfMemory, RanksFailedAlike) as error:
            self._alone[kind] = False
            logger.info("a step of %d video tokens is not for one GPU: %s", kind.video_tokens, first_line(error))
            return answer
        if was_disturbed():
            return answer
        self._remember(kind, alone_s <= shared_s)
        ranks = kind.config.world_size
        logger.info(
            "a step of %d video tokens takes %.3f s on one GPU and %.3f s on %d (the link takes up to %.3f s of it, at %.1f GB/s "
            "and %.2f ms for each exchange): videos of this size run on %s. Ray Init Actor has all work on it where its "
            "ulysses_degree is not 0",
            kind.video_tokens, alone_s, shared_s, ranks, link_s, exchange.bytes_per_s / 1e9, exchange.small_s * 1e3,
            "one" if self._alone[kind] else f"all {ranks}",
        )  # fmt: skip
        return answer_alone if self._alone[kind] else answer

    def step_of_all(
        self, kind: StepKind, exchange: ExchangeReport, element_bytes: int, compute: Callable[[bool], _Result]
    ) -> _Result:
        """What `compute` gives by all ranks. The second of its kind says where one would take no longer, as far as is known."""
        answer, shared_s = _timed(compute, False)
        self._seen[kind] += 1
        if self._seen[kind] == _TOLD_AT:
            link_s = kind.link_s(exchange, element_bytes)
            alone_s = kind.alone_s(shared_s, link_s, HIDDEN)
            if alone_s < shared_s:
                logger.warning(
                    "a step of %d video tokens takes %.2f s on %d GPUs, of which the link can take %.2f s (%.1f GB/s, %.2f ms "
                    "for each exchange): one GPU would take about %.2f s, and do as well for videos of this size",
                    kind.video_tokens, shared_s, kind.config.world_size, link_s, exchange.bytes_per_s / 1e9,
                    exchange.small_s * 1e3, alone_s,
                )  # fmt: skip
        return answer

    def _by_one(self, kind: StepKind, compute: Callable[[bool], _Result]) -> _Result:
        """By all where it does not fit one any more: something else has come to its device."""
        try:
            return compute(True)
        except OutOfMemory as error:
            self._alone[kind] = False
            logger.warning("%s: steps of %d video tokens run on all GPUs now", first_line(error), kind.video_tokens)
            return compute(False)

    def _remember(self, kind: StepKind, alone: bool) -> None:
        self._alone[kind] = alone
        record = {**read_record(self._path), str(kind): alone}
        write_record(self._path, record, "which steps one GPU takes alone", "it will be tried again")


def _timed(compute: Callable[[bool], _Result], alone: bool) -> tuple[_Result, float]:
    started = time.monotonic()
    answer = compute(alone)
    return answer, time.monotonic() - started


def shape_of(model: Any) -> ModelShape:
    """Of a ComfyUI model, that may be without weights."""
    return ModelShape(
        blocks=len(model.transformer_blocks),
        width=model.inner_dim,
        audio_width=model.audio_inner_dim if has_audio(model) else 0,
        heads=model.num_attention_heads,
        modulates_text=hasattr(model.transformer_blocks[0], "prompt_scale_shift_table"),
    )
