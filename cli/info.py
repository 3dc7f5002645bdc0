"""`rayltx info FILE`: what a checkpoint is, what it needs, which degrees fit."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.step_plan import activation_bytes
from rayltx.expansion.comfyui_gguf.checkpoint import open_model_file
from rayltx.sequence_parallel.partition import ParallelConfig

if TYPE_CHECKING:
    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel

_WORKER_COUNTS = (1, 2, 3, 4, 6, 8)


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

    console = Console(width=max(Console().width, 100))
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
    for column in ("workers", "ulysses x ring", "tokens each", "heads each", "weights", "activations", "together"):
        table.add_column(column, justify="right", no_wrap=True)
    for workers in _WORKER_COUNTS:
        for ring in (degree for degree in range(1, workers + 1) if workers % degree == 0):
            table.add_row(*_row(checkpoint, model, shape, ParallelConfig(workers // ring, ring)))
    console.print(table)


def _row(checkpoint: Checkpoint, model: DiffusersModel, shape: LatentShape, config: ParallelConfig) -> list[str]:
    tokens, heads = config.token_sizes(shape.num_tokens).sizes, config.head_sizes(model.num_heads).sizes
    activations = activation_bytes(config, shape.num_tokens, model.width, model.num_heads)
    note = "" if heads[-1] else " (idle ranks)"
    return [
        str(config.world_size),
        f"{config.ulysses_degree} x {config.ring_degree}",
        _range(tokens),
        _range(heads) + note,
        _size(checkpoint.num_bytes),
        _size(activations),
        _size(checkpoint.num_bytes + activations),
    ]


def _range(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[-1]}-{sizes[0]}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
