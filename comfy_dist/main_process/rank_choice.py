"""Fewer GPUs take a step where all are no faster: a small video, or a slow link, such as that between machines.

What the link takes of a step is known before it: counted from the shape (`step_cost`), at the speed that the first exchange
measured. Where half of the ranks, or half of these, could be as fast if all of that is waited for, the step is timed on all and
on the first so many, with the same inputs, and the fastest way is the one for this kind of step: from the first step of the
first run on, and remembered, so that a picture does not come out of one way today and of another tomorrow, whose last bits
differ. Where a user has given shares or `ulysses_degree`, all ranks work, and the log says where fewer would do as well.
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
from rayltx.errors import (
    ClusterError,
    OutOfMemory,
    RanksFailedAlike,
    SelfTestError,
    StepCancelled,
    first_line,
    listed,
)
from rayltx.json_records import read_record, write_record
from rayltx.sequence_parallel.first_exchange import ExchangeReport
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

# Of a first step's time, which may be many times a later one's: what the link takes at least where more is looked into.
_LOOKED_INTO = 0.02
_TOLD_AT = 2  # the step of its kind
_SHORTEST_S = 1e-9  # of computing, where the link would take all of a step and more

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

    def least_s(self, ranks: int, shared_s: float, link_s: float) -> float:
        """That fewer ranks take at least, where all take `shared_s`: if that includes all of the link, and theirs is nothing."""
        return self._cost(self.config.of_first(ranks)).flops / self._flops_per_s(shared_s, link_s, hidden=0.0)

    def expected_s(self, ranks: int, shared_s: float, exchange: ExchangeReport, element_bytes: int) -> float:
        """That fewer ranks take, if their link is as that of all, and goes on behind computing as well."""
        flops_per_s = self._flops_per_s(shared_s, self.link_s(exchange, element_bytes), HIDDEN)
        cost = self._cost(self.config.of_first(ranks))
        return cost.seconds(flops_per_s, exchange.bytes_per_s / element_bytes, exchange.small_s, HIDDEN)

    def _flops_per_s(self, shared_s: float, link_s: float, hidden: float) -> float:
        """Of a rank. hidden: of the exchange, behind computing."""
        return self._cost(self.config).flops / max(computing_s(shared_s, link_s, hidden), _SHORTEST_S)

    def _cost(self, config: ParallelConfig) -> StepCost:
        return StepCost.of(self.shape, self.video_tokens, self.audio_tokens, config, self.rows, keeps_text=True)

    def __str__(self) -> str:
        """The same for the same kind in another process."""
        return ", ".join(f"{field.name}: {getattr(self, field.name)!r}" for field in dataclasses.fields(self))


@dataclass(frozen=True)
class _Choice:
    """ranks: how many take a step. among: which fewer than all were looked into for it."""

    ranks: int
    among: tuple[int, ...]

    @classmethod
    def of_record(cls, found: object) -> _Choice | None:
        """None for what is not one, as an earlier version's."""
        if (
            not isinstance(found, dict)
            or type(found.get("ranks")) is not int
            or not isinstance(found.get("among"), list)
        ):
            return None
        return cls(found["ranks"], tuple(found["among"]))


class RankChoice:
    """Of what is known about kinds of steps. path: of the file that remembers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._choices: dict[StepKind, _Choice] = {}
        self._seen: Counter[StepKind] = Counter()

    def step(
        self,
        kind: StepKind,
        exchange: ExchangeReport,
        element_bytes: int,
        compute: Callable[[int], _Result],
        fewer: Sequence[int],
        was_disturbed: Callable[[], bool] = lambda: False,
    ) -> _Result:
        """What `compute` gives: of a step, by so many of the first ranks, whichever number is fastest.

        compute: may be called twice for each number, for a kind that is not known. It may raise SelfTestError for fewer than
        all. fewer: of the config's `halves`, those that have the memory for it, in that order.
        was_disturbed: whether something else than the steps took time meanwhile: then nothing is learnt of them.
        """
        every = kind.config.world_size
        if not fewer:
            return compute(every)
        known = self._known(kind)
        if known is not None and {*fewer} <= {*known.among}:
            return self._by_fewer(kind, known, compute) if known.ranks in fewer else compute(every)
        answer, first_s = _timed(compute, every)
        link_s = kind.link_s(exchange, element_bytes)
        if link_s < _LOOKED_INTO * first_s:
            self._choices[kind] = _Choice(every, tuple(fewer))
            return answer
        answers: dict[int, _Result] = {}
        seconds: dict[int, float] = {}
        answers[every], seconds[every] = _timed(compute, every)
        if was_disturbed():
            return answers[every]
        not_tried: tuple[int, ...] = ()
        for number, ranks in enumerate(fewer):
            if kind.least_s(ranks, seconds[every], link_s) >= min(seconds.values()):
                continue
            try:
                _timed(compute, ranks)
                answers[ranks], seconds[ranks] = _timed(compute, ranks)
            except StepCancelled:
                raise
            except (ClusterError, SelfTestError) as error:
                told = kind.video_tokens, _gpus(ranks), first_line(error)
                logger.info("a step of %d video tokens is not for %s: %s", *told)
                if not isinstance(error, SelfTestError):
                    not_tried = tuple(fewer[number:])  # what was in the way may be gone at the next start
                    break
            if was_disturbed():
                return answers[every]
        chosen = min(seconds, key=lambda ranks: (seconds[ranks], ranks))
        self._choices[kind] = _Choice(chosen, tuple(fewer))
        self._remember(kind, _Choice(chosen, tuple(ranks for ranks in fewer if ranks not in not_tried)))
        if len(seconds) > 1:
            logger.info(
                "a step of %d video tokens takes %s (the link takes up to %.3f s of it, at %.1f GB/s and %.2f ms for each "
                "exchange): videos of this size run on %s. Ray Init Actor has all work on it where its ulysses_degree is not 0",
                kind.video_tokens, listed([f"{each:.3f} s on {_gpus(ranks)}" for ranks, each in seconds.items()]), link_s,
                exchange.bytes_per_s / 1e9, exchange.small_s * 1e3,
                f"all {every}" if chosen == every else _gpus(chosen),
            )  # fmt: skip
        return answers[chosen]

    def step_of_all(
        self, kind: StepKind, exchange: ExchangeReport, element_bytes: int, compute: Callable[[int], _Result]
    ) -> _Result:
        """What `compute` gives by all ranks. The second of its kind says where fewer would take no longer, as far as is known."""
        every = kind.config.world_size
        answer, shared_s = _timed(compute, every)
        self._seen[kind] += 1
        if self._seen[kind] == _TOLD_AT:
            expected = {
                ranks: kind.expected_s(ranks, shared_s, exchange, element_bytes) for ranks in kind.config.halves
            }
            best = min(expected, key=lambda ranks: (expected[ranks], ranks))
            if expected[best] < shared_s:
                logger.warning(
                    "a step of %d video tokens takes %.2f s on %d GPUs, of which the link can take %.2f s (%.1f GB/s, %.2f ms "
                    "for each exchange): %s would take about %.2f s, and do as well for videos of this size",
                    kind.video_tokens, shared_s, every, kind.link_s(exchange, element_bytes), exchange.bytes_per_s / 1e9,
                    exchange.small_s * 1e3, _gpus(best), expected[best],
                )  # fmt: skip
        return answer

    def _known(self, kind: StepKind) -> _Choice | None:
        if kind not in self._choices:
            found = _Choice.of_record(read_record(self._path).get(str(kind)))
            if found is None:
                return None
            self._choices[kind] = found
        return self._choices[kind]

    def _by_fewer(self, kind: StepKind, known: _Choice, compute: Callable[[int], _Result]) -> _Result:
        """By all where these cannot any more: something else has come to a device, or ComfyUI is another."""
        try:
            return compute(known.ranks)
        except (OutOfMemory, RanksFailedAlike, SelfTestError) as error:
            every = kind.config.world_size
            self._choices[kind] = dataclasses.replace(known, ranks=every)
            logger.warning("%s: steps of %d video tokens run on all GPUs now", first_line(error), kind.video_tokens)
            return compute(every)

    def _remember(self, kind: StepKind, choice: _Choice) -> None:
        record = {**read_record(self._path), str(kind): dataclasses.asdict(choice)}
        write_record(self._path, record, "how many GPUs take which steps", "it will be tried again")


def _gpus(ranks: int) -> str:
    return "one GPU" if ranks == 1 else f"{ranks} GPUs"


def _timed(compute: Callable[[int], _Result], ranks: int) -> tuple[_Result, float]:
    started = time.monotonic()
    answer = compute(ranks)
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
