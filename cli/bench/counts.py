"""`rayltx bench counts`: what a layer computes, exchanges and holds on a rank, counted at the real widths.

Nothing is computed: tensors have shapes and no numbers (see `fake_ranks`). One forward with one layer and one with two are
counted, of a text-to-video step on rank 0, which has the most tokens; their difference is a layer. It is not the first step of
its run: the text's keys and values are there already, where steps do not change them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from rayltx.cli.bench.fake_ranks import Counts, counted, rank_zero_of
from rayltx.cli.bench.real_sizes import comfyui_config, transformer_config
from rayltx.cli.bench.small_models import enter_comfyui
from rayltx.cli.packages import require_packages
from rayltx.comfy_dist.comfy_environment import check_comfyui
from rayltx.diffusion_models.lightricks.feed_forward import AUTOMATIC
from rayltx.diffusion_models.lightricks.kept_tables import KeptTables
from rayltx.diffusion_models.lightricks.kept_text import KeptText
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.step_cost import TEXT_TOKENS
from rayltx.diffusion_models.lightricks.tiny_configs import TRANSFORMER_CONFIGS
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

_DTYPE = torch.bfloat16
_SIGMA = 0.8
_LINES = 6  # of source, that are shown of the peak

Forward = Callable[[SequenceParallelGroup, KeptText], object]


@dataclass(frozen=True)
class LayerCounts:
    """A layer on rank 0; at the peak also what is outside of layers."""

    config: ParallelConfig
    flops: int
    received_bytes: int
    minimum_bytes: int  # that Ulysses' exchange of video self-attention receives
    collectives: int
    operations: int
    peak_bytes: int
    held_at_peak: dict[str, int]
    kept_text_bytes: int  # of a layer, from the first step on; not in the peak
    plain_peak_bytes: int  # of the model on one card, its feed-forward at once; of ComfyUI's by itself

    @property
    def of_minimum(self) -> float:
        return self.received_bytes / self.minimum_bytes if self.minimum_bytes else 1.0


@dataclass(frozen=True)
class CountOptions:
    version: str
    width: int
    height: int
    frames: int
    ranks: Sequence[int]
    chunks: int  # of the feed-forward; 0: as runs have it
    comfyui: Path | None
    as_json: bool


def parse_ranks(text: str) -> list[int]:
    """Numbers from "1,2,4", in order. Raises InputError."""
    try:
        ranks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        ranks = []
    if not ranks or ranks[0] < 1:
        raise InputError(f'ranks="{text}" must be numbers of at least 1 separated by commas')
    return ranks


def run_counts(options: CountOptions) -> None:
    """Print. Raises InputError for sizes and versions, and MissingPackageError."""
    if options.version not in TRANSFORMER_CONFIGS:
        raise InputError(f"model={options.version} must be one of {', '.join(TRANSFORMER_CONFIGS)}")
    shape = LatentShape.from_pixels(options.width, options.height, options.frames)
    found = layer_counts(options.version, shape, options.ranks, options.chunks, options.comfyui)
    if options.as_json:
        about = {**dataclasses.asdict(options), "comfyui": options.comfyui and str(options.comfyui)}
        counts = [{**dataclasses.asdict(each), "of_minimum": each.of_minimum} for each in found]
        print(json.dumps({"options": about, "layers": counts}, indent=2))
    else:
        _print(options, shape, found)


def layer_counts(
    version: str, shape: LatentShape, ranks: Sequence[int], chunks: int = AUTOMATIC, comfyui: Path | None = None
) -> list[LayerCounts]:
    """A layer of a version's real width on 1 of so many ranks, for each of `ranks`.

    comfyui: the folder of a ComfyUI, whose model it is then; None: diffusers'.
    """
    if comfyui is None:
        require_packages(("diffusers",), "bench counts")
    else:
        check_comfyui(comfyui)
    model_of = _diffusers_forward if comfyui is None else _comfyui_forward(comfyui)
    width = transformer_config(version, 1)["cross_attention_dim"]
    plain, _ = _counts_of(model_of, version, 2, shape, None, ParallelConfig())
    found = []
    for degree in ranks:
        config = ParallelConfig(degree)
        (one, kept_of_one), (two, kept_of_two) = (
            _counts_of(model_of, version, layers, shape, chunks, config) for layers in (1, 2)
        )
        minimum = round(4 * config.token_sizes(shape.num_tokens).sizes[0] * width * _DTYPE.itemsize * (1 - 1 / degree))
        found.append(
            LayerCounts(
                config, two.flops - one.flops, two.received_bytes - one.received_bytes, minimum,
                two.collectives - one.collectives, two.operations - one.operations, two.peak_bytes, two.held_at_peak,
                kept_of_two - kept_of_one, plain.peak_bytes,
            )
        )  # fmt: skip
    return found


def _counts_of(
    model_of: Callable[..., Forward],
    version: str,
    layers: int,
    shape: LatentShape,
    chunks: int | None,
    config: ParallelConfig,
) -> tuple[Counts, int]:
    """Of a step, and the bytes of what is kept of the text. chunks: None for the model by itself, on one rank."""
    # Tensors without numbers cannot be compared: each text is that of the step before.
    kept_text = KeptText(lambda: math.inf, are_equal=lambda kept, now: True)
    with rank_zero_of(config) as group, FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        forward = model_of(version, layers, shape, chunks)
        forward(group, kept_text)
        with counted() as counts:
            out = forward(group, kept_text)
        del out
        return counts, kept_text.num_bytes


def _latent(shape: LatentShape) -> torch.Tensor:
    return torch.empty(1, 128, shape.frames, shape.height, shape.width, dtype=_DTYPE)


def _diffusers_forward(version: str, layers: int, shape: LatentShape, chunks: int | None) -> Forward:
    from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint, TensorInfo
    from rayltx.diffusion_models.lightricks.diffusers_host import DiffusersHost
    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
    from rayltx.diffusion_models.lightricks.tiny_models import build_reference, official_tensors

    config = transformer_config(version, layers)
    with torch.device("meta"):
        named = official_tensors(build_reference(version, layers, config), prefix="")
    infos = {name: TensorInfo(_DTYPE, tuple(tensor.shape)) for name, tensor in named.items()}
    model = DiffusersModel.of_checkpoint(Checkpoint("a model without weights", "", infos, {}, {"transformer": config}))
    host = DiffusersHost(model)
    host.assign({name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()})
    host.finish_loading()
    widths = model.context_widths()
    inputs: dict[str, Any] = {
        "latent": _latent(shape),
        "timestep": torch.full((1,), _SIGMA),
        "context": torch.empty(1, TEXT_TOKENS, widths[0], dtype=_DTYPE),
        "feed_forward_chunks": 1 if chunks is None else chunks,
    }
    if model.has_audio:
        inputs["audio_latent"] = torch.empty(1, 8, shape.audio_tokens(), 16, dtype=_DTYPE)
        inputs["audio_context"] = torch.empty(1, TEXT_TOKENS, widths[1], dtype=_DTYPE)

    def forward(group: SequenceParallelGroup, kept_text: KeptText) -> object:
        host.kept_text = kept_text
        host.kept_tables = KeptTables()  # made anew: they cannot be compared either
        return host.forward(group, inputs)

    return forward


def _comfyui_forward(folder: Path) -> Callable[..., Forward]:
    enter_comfyui(folder)

    def forward_of(version: str, layers: int, shape: LatentShape, chunks: int | None) -> Forward:
        import comfy.ops

        from rayltx.comfy_dist.model_spec import has_audio, text_width
        from rayltx.comfy_dist.tiny_checkpoints import model_class
        from rayltx.diffusion_models.lightricks.comfyui_rows import shared

        operations = comfy.ops.disable_weight_init
        model = model_class(version)(
            **comfyui_config(version, layers), dtype=_DTYPE, device="cpu", operations=operations
        ).requires_grad_(False)
        x: Any = _latent(shape)
        timestep: Any = torch.full((1,), _SIGMA)
        mask = None
        if has_audio(model):
            x, timestep = [x, torch.empty(1, 8, shape.audio_tokens(), 16, dtype=_DTYPE)], (timestep, timestep)
        else:
            mask = torch.ones(1, TEXT_TOKENS, dtype=torch.int64)
        context = torch.empty(1, TEXT_TOKENS, text_width(model), dtype=_DTYPE)

        def forward(group: SequenceParallelGroup, kept_text: KeptText) -> object:
            with contextlib.ExitStack() as scope:
                if chunks is not None:
                    scope.enter_context(shared(model, group, chunks, kept_text=kept_text))
                return model(x, timestep, context=context, attention_mask=mask, frame_rate=25.0, transformer_options={})

        return forward

    return forward_of


def _print(options: CountOptions, shape: LatentShape, found: list[LayerCounts]) -> None:
    console = Console(width=max(Console().width, 110))
    host = "diffusers'" if options.comfyui is None else "ComfyUI's"
    console.print(
        f"{host} {options.version}, {options.width}x{options.height}, {options.frames} frames: {shape.num_tokens} video tokens. "
        "A layer on the rank with the most tokens, bfloat16; all of it counted",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD)
    columns = (
        "ranks",
        "GFLOP",
        "all ranks'",
        "received",
        "of the minimum",
        "collectives",
        "operations",
        "peak",
        "of plain",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    alone = found[0] if found[0].config.world_size == 1 else None
    for each in found:
        ranks = each.config.world_size
        table.add_row(
            str(ranks),
            f"{each.flops / 1e9:.1f}",
            f"{ranks * each.flops / alone.flops:.4f}" if alone else "",
            f"{each.received_bytes / 2**20:.2f} MiB",
            f"{each.of_minimum:.4f}" if ranks > 1 else "",
            str(each.collectives),
            str(each.operations),
            f"{each.peak_bytes / 2**20:.0f} MiB",
            f"{each.peak_bytes / each.plain_peak_bytes:.3f}",
        )
    console.print(table)
    for each in found:
        console.print(f"at the peak on 1 of {each.config.world_size}:", highlight=False)
        for line, num_bytes in list(each.held_at_peak.items())[:_LINES]:
            console.print(f"  {num_bytes / 2**20:8.0f} MiB  {line}", highlight=False)
