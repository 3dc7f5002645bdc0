"""`rayltx info FILE`: what a checkpoint is, what it needs, which degrees fit."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rayltx.cli.plan import audio_tokens, cards_here, described, shape_of
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.step_plan import Plan, Work, best, plan, ways_to_share
from rayltx.expansion.comfyui_gguf.checkpoint import open_model_file

if TYPE_CHECKING:
    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel

_WORKER_COUNTS = (1, 2, 3, 4, 6, 8)
_COLUMNS = (
    "workers", "ulysses x ring", "tokens each", "heads each", "weights", "activations", "together", "a step", "times one",
)  # fmt: skip


def run_info(file: Path, width: int, height: int, frames: int) -> None:
    """Print. Raises CheckpointError for a file that is not a whole LTX checkpoint, InputError for sizes."""
    shape = LatentShape.from_pixels(width, height, frames)
    checkpoint = open_model_file(file)

    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel  # takes seconds to import

    model = DiffusersModel.of_checkpoint(checkpoint)
    dtypes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        dtypes[info.type_name] += math.prod(info.values_shape)
    parameters = sum(dtypes.values())

    console = Console(width=max(Console().width, 124))
    console.print(f"[bold]{Path(checkpoint.path).name}[/]: {checkpoint.version} transformer")
    console.print(f"  parameters  {_count(parameters)} in {checkpoint.num_blocks} blocks")
    console.print(
        f"  dtypes      {', '.join(f'{name} {share / parameters:.1%}' for name, share in dtypes.most_common())}"
    )
    console.print(f"  weights     {_size(checkpoint.num_bytes)}")
    console.print(f"  attention   {model.num_heads} heads of {model.width // model.num_heads}")
    video, audio = model.context_widths()
    console.print(f"  text        width {video}" + (f" (video), {audio} (audio)" if checkpoint.has_audio else ""))

    table = Table(
        box=None,
        title=f"{width}x{height}, {frames} frames: {shape.num_tokens} video tokens. Memory per GPU is an estimate.",
        title_justify="left",
    )
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    cards, origins = cards_here(measures=False)
    model_shape = dataclasses.replace(shape_of(checkpoint), heads=model.num_heads)
    work = Work(model_shape, checkpoint.num_bytes, shape.num_tokens, audio_tokens(model_shape, shape))
    ways = [config for config in ways_to_share(max(_WORKER_COUNTS), rows=1) if config.world_size in _WORKER_COUNTS]
    plans = [plan(work, cards, config) for config in ways]
    chosen = best(plans)
    for found in plans:
        table.add_row(*_row(checkpoint, model, shape, found), style="bold" if found is chosen else "")
    console.print(table)
    console.print(
        f"A step is a calculation, for one row of a batch; the best way is bold: {described(cards, origins)}. "
        "`rayltx plan` has more ways.",
        highlight=False,
    )


def _row(checkpoint: Checkpoint, model: DiffusersModel, shape: LatentShape, found: Plan) -> list[str]:
    config, activations = found.config, found.activation_bytes
    tokens, heads = config.token_sizes(shape.num_tokens).sizes, config.head_sizes(model.num_heads).sizes
    note = "" if heads[-1] else " (idle ranks)"
    return [
        str(config.world_size),
        f"{config.ulysses_degree} x {config.ring_degree}",
        _range(tokens),
        _range(heads) + note,
        _size(checkpoint.num_bytes),
        _size(activations),
        _size(checkpoint.num_bytes + activations),
        f"{found.seconds:.2f} s" if found.seconds >= 0.1 else f"{1e3 * found.seconds:.1f} ms",
        f"{found.speedup:.2f}",
    ]


def _range(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[-1]}-{sizes[0]}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
