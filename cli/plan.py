"""`rayltx plan`: what each way to share a step comes to, and which is best."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rayltx.devices import CPU, automatic, kind_of
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.step_cost import LTX_2, ModelShape
from rayltx.diffusion_models.lightricks.step_plan import (
    ASSUMED_CARDS,
    HIDDEN,
    Cards,
    Plan,
    Work,
    best,
    plan,
    ways_to_share,
)
from rayltx.distributed_worker.device_speed import flops_per_s
from rayltx.errors import InputError
from rayltx.expansion.comfyui_gguf.checkpoint import open_model_file


@dataclass(frozen=True)
class PlanOptions:
    """Numbers of 0 stand for what is measured or assumed."""

    checkpoint: Path | None
    width: int
    height: int
    frames: int
    workers: int
    cfg: float
    clips: int
    tflops: float
    link: float  # 1e9 bytes a second
    memory: float  # GiB
    with_ring: bool
    as_json: bool


def model_of(path: Path | None) -> tuple[ModelShape, int]:
    """The shape and bytes of a checkpoint's transformer; LTX-2's own shape, and no bytes, without one."""
    if path is None:
        return LTX_2, 0
    checkpoint = open_model_file(path)
    return shape_of(checkpoint), checkpoint.num_bytes


def shape_of(checkpoint: Checkpoint) -> ModelShape:
    """Of its transformer, with as many heads as all of LTX's have."""

    def width(attention: str) -> int:
        found = checkpoint.tensors.get(f"transformer_blocks.0.{attention}.to_q.weight")
        return 0 if found is None else found.values_shape[0]

    modulates_text = "transformer_blocks.0.prompt_scale_shift_table" in checkpoint.tensors
    return ModelShape(checkpoint.num_blocks, width("attn1"), width("audio_attn1"), modulates_text=modulates_text)


def audio_tokens(model: ModelShape, shape: LatentShape) -> int:
    """Of sound as long as the video."""
    return shape.audio_tokens() if model.audio_width else 0


def run_plan(options: PlanOptions) -> None:
    """Print. Raises CheckpointError for a file that is not a whole LTX checkpoint, InputError for sizes and numbers."""
    for name in ("workers", "clips"):
        if getattr(options, name) < 1:
            raise InputError(f"{name}={getattr(options, name)} must be at least 1")
    for name in ("tflops", "link", "memory"):
        if getattr(options, name) < 0:
            raise InputError(
                f"{name}={getattr(options, name)} must be above 0; 0 stands for what is measured or assumed"
            )
    shape = LatentShape.from_pixels(options.width, options.height, options.frames)
    model, weight_bytes = model_of(options.checkpoint)
    rows = options.clips * (1 if options.cfg == 1.0 else 2)
    work = Work(model, weight_bytes, shape.num_tokens, audio_tokens(model, shape), rows)
    cards, origins = cards_here(
        flops_per_s=options.tflops * 1e12, link_bytes_per_s=options.link * 1e9, memory_bytes=int(options.memory * 2**30)
    )
    ways = ways_to_share(options.workers, rows)
    plans = [plan(work, cards, config) for config in ways if options.with_ring or config.ring_degree == 1]
    chosen = best(plans)
    if options.as_json:
        print(json.dumps(_as_json(work, cards, origins, plans, chosen), indent=2))
    else:
        _print(options, work, cards, origins, plans, chosen)


def cards_here(measures: bool = True, **given: float) -> tuple[Cards, dict[str, str]]:
    """The cards, and where each of their numbers comes from. given: fields of `Cards`; 0 for what is not.

    measures: whether a device may be computed on. A full one is not.
    """
    kind = kind_of(automatic())
    found: dict[str, Callable[[], float]] = {}
    if kind.name != CPU:
        found["memory_bytes"] = kind.total_bytes
        if measures:
            found["flops_per_s"] = lambda: flops_per_s(kind)
    numbers, origins = dataclasses.asdict(ASSUMED_CARDS), {}
    for name in numbers:
        origins[name] = "assumed"
        if given.get(name):
            numbers[name], origins[name] = given[name], "given"
        elif name in found:
            with contextlib.suppress(RuntimeError):  # of a device without memory
                numbers[name], origins[name] = found[name](), "measured here"
    return Cards(**numbers), origins


def described(cards: Cards, origins: dict[str, str]) -> str:
    """In a sentence, with where each number comes from."""
    return (
        f"a card computes {cards.flops_per_s / 1e12:.0f} TFLOP/s ({origins['flops_per_s']}), has "
        f"{cards.memory_bytes / 2**30:.0f} GiB ({origins['memory_bytes']}), receives {cards.link_bytes_per_s / 1e9:.1f} GB/s "
        f"from others ({origins['link_bytes_per_s']}) and {cards.host_bytes_per_s / 1e9:.0f} GB/s from the host "
        f"({origins['host_bytes_per_s']})"
    )


def _print(
    options: PlanOptions, work: Work, cards: Cards, origins: dict[str, str], plans: list[Plan], chosen: Plan
) -> None:
    console = Console(width=max(Console().width, 110))
    gib = 2**30
    console.print(
        f"{options.width}x{options.height}, {options.frames} frames: {work.video_tokens} video tokens, {work.audio_tokens} of "
        f"audio, {work.rows} {'row' if work.rows == 1 else 'rows'} a step (counted)\n"
        f"{described(cards, origins)}\n"
        f"{HIDDEN:.0%} of the exchange goes on behind computing (measured on CPU ranks with a modelled link)",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD)
    columns = ("", "cards", "ulysses x ring x cfg", "a step", "times one", "efficiency", "received", "held", "weights")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for found in plans:
        config = found.config
        table.add_row(
            "best" if found is chosen else "",
            str(config.world_size),
            f"{config.ulysses_degree} x {config.ring_degree} x {config.cfg_degree}",
            f"{found.seconds:.2f} s",
            f"{found.speedup:.2f}",
            f"{found.efficiency:.0%}",
            f"{found.received_bytes / gib:.2f} GiB",
            f"{found.activation_bytes / gib:.1f} GiB",
            _weights(work, found),
            style="bold" if found is chosen else "",
        )
    console.print(table)
    most = max(found.config.world_size for found in plans)
    if chosen.config.world_size < most:
        console.print(
            f"more than {chosen.config.world_size} of these cards bring next to nothing for this size: {chosen.bound_by}"
        )


def _weights(work: Work, found: Plan) -> str:
    if not work.weight_bytes:
        return ""
    gib = 2**30
    if found.streamed_bytes:
        return f"{found.streamed_bytes / gib:.1f} of {work.weight_bytes / gib:.1f} GiB streamed"
    return f"{work.weight_bytes / gib:.1f} GiB"


def _as_json(work: Work, cards: Cards, origins: dict[str, str], plans: list[Plan], chosen: Plan) -> dict[str, object]:
    numbers = dataclasses.asdict(cards)
    return {
        "work": dataclasses.asdict(work),
        "cards": {name: {"value": numbers[name], "origin": origins[name]} for name in numbers},
        "hidden": {"value": HIDDEN, "origin": "measured on CPU ranks with a modelled link"},
        "plans": [
            {**dataclasses.asdict(found), "efficiency": found.efficiency, "is_best": found is chosen} for found in plans
        ],
    }
