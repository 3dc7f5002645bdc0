"""The subcommands of `rayltx bench`, and their options."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from rayltx.cli.option_types import ComfyUIOption, Device, DeviceOption
from rayltx.errors import InputError

if TYPE_CHECKING:
    from rayltx.cli.bench.report import Output


class ComputeDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


bench = typer.Typer(no_args_is_help=True, help="Measure and count.")

WorkersOption = Annotated[int, typer.Option(help="How many workers, each with one thread of the CPU.")]
RoundsOption = Annotated[int, typer.Option(help="How often all is measured, in turn; medians are compared.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]
PlotOption = Annotated[
    Optional[Path],  # noqa: UP045  (evaluated on Python 3.10)
    typer.Option(help="Also as a picture, .png or .svg. Needs matplotlib."),
]

ComfyUIFolder = Annotated[Path, typer.Option("--comfyui", help="The folder of a ComfyUI, whose model it is.")]
ModelOption = Annotated[str, typer.Option(help="LTX-Video, LTX-2, LTX-2.3 or LTX-2.5, in small.")]
RanksOption = Annotated[str, typer.Option(help="Numbers of ranks.")]
WidthOption = Annotated[int, typer.Option(help="Pixels, a multiple of 32.")]
HeightOption = Annotated[int, typer.Option(help="Pixels, a multiple of 32.")]
FramesOption = Annotated[int, typer.Option(help="Pixel frames, 8k + 1.")]


@bench.command()
def counts(
    model: Annotated[str, typer.Option(help="LTX-Video, LTX-2, LTX-2.3 or LTX-2.5.")] = "LTX-2",
    width: WidthOption = 1280,
    height: HeightOption = 704,
    frames: FramesOption = 121,
    ranks: RanksOption = "1,2,4,8",
    chunks: Annotated[int, typer.Option(help="Feed-forward in so many portions; 0: automatic, 1: at once.")] = 0,
    comfyui: ComfyUIOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count what a layer of the real width computes, exchanges and holds on a rank. Takes seconds, on any machine."""
    from rayltx.cli.bench.counts import CountOptions, parse_ranks, run_counts

    run_counts(CountOptions(model, width, height, frames, parse_ranks(ranks), chunks, comfyui, as_json))


@bench.command()
def compare(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, of at least 2.")] = "2,4,8",
    width: WidthOption = 1280,
    height: HeightOption = 704,
    frames: FramesOption = 121,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Count what our exchange around attention moves, computes and holds, against other ways to share it."""
    from rayltx.cli.bench.compare import CompareOptions, run_compare
    from rayltx.cli.bench.counts import parse_ranks

    run_compare(CompareOptions(parse_ranks(ranks), width, height, frames), _output(as_json, plot))


@bench.command()
def dispatch(
    workers: WorkersOption = 2,
    steps: Annotated[int, typer.Option(help="In a round.")] = 20,
    rounds: RoundsOption = 5,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Time steps of a model that does nothing: what it costs to have a step done by workers."""
    from rayltx.cli.bench.dispatch import DispatchOptions, run_dispatch

    run_dispatch(DispatchOptions(workers, steps, rounds), _output(as_json, plot))


@bench.command()
def shard(
    model: ModelOption = "LTX-2",
    workers: WorkersOption = 2,
    rounds: RoundsOption = 5,
    width: WidthOption = 512,
    height: HeightOption = 512,
    frames: FramesOption = 57,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 2,
    device: DeviceOption = Device.auto,
    comfyui: ComfyUIOption = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Time what ranks compute together of what one computes alone, and compare with what `rayltx plan` counts."""
    from rayltx.cli.bench.shard import ShardOptions, run_shard

    options = ShardOptions(model, workers, rounds, width, height, frames, layers, device.value, comfyui)
    run_shard(options, _output(as_json, plot))


@bench.command()
def overlap(
    model: ModelOption = "LTX-2",
    links: Annotated[str, typer.Option(help="All exchanges of a forward over all its work.")] = "0.1,0.2,0.4",
    rounds: RoundsOption = 7,
    width: WidthOption = 512,
    height: HeightOption = 512,
    frames: FramesOption = 57,
    comfyui: ComfyUIOption = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Measure how much of the exchange of two ranks goes on behind their work, on a modelled link and processor time."""
    from rayltx.cli.bench.overlap import OverlapOptions, parse_links, run_overlap

    options = OverlapOptions(model, parse_links(links), rounds, width, height, frames, comfyui)
    run_overlap(options, _output(as_json, plot))


@bench.command()
def start(
    workers: WorkersOption = 2,
    rounds: RoundsOption = 3,
    comfyui: ComfyUIOption = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Time workers from the start until they are ready, against one process that imports the model's code."""
    from rayltx.cli.bench.start import StartOptions, run_start

    run_start(StartOptions(workers, rounds, comfyui), _output(as_json, plot))


@bench.command()
def load(
    gib: Annotated[float, typer.Option(help="Size of the checkpoint, about.")] = 1.1,
    workers: WorkersOption = 4,
    rounds: Annotated[int, typer.Option(help="How often all is measured, in turn; once with --comfyui.")] = 3,
    type: Annotated[
        Optional[str],  # noqa: UP045  (evaluated on Python 3.10)
        typer.Option(help="With --comfyui, of a GGUF file: Q8_0 or Q4_0. Without: float32 in safetensors."),
    ] = None,
    changes: Annotated[int, typer.Option(help="With --comfyui: how often a LoRA is put on and off.")] = 10,
    comfyui: ComfyUIOption = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Measure memory and time of one checkpoint on several workers; with --comfyui, memory through unloading and LoRAs."""
    output = _output(as_json, plot)
    if comfyui is not None:
        from rayltx.cli.bench.load_in_comfyui import LoadInComfyUIOptions, run_load_in_comfyui

        run_load_in_comfyui(LoadInComfyUIOptions(gib, workers, type, changes, comfyui), output)
        return
    from rayltx.cli.bench.load import LoadOptions, run_load

    if type is not None:
        raise InputError(f"type={type} is for ComfyUI's model; give --comfyui FOLDER, or leave it out")
    run_load(LoadOptions(gib, workers, rounds), output)


@bench.command()
def lora(
    comfyui: ComfyUIFolder,
    workers: WorkersOption = 2,
    rounds: RoundsOption = 3,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 16,
    model_width: Annotated[int, typer.Option(help="Of the model.")] = 1024,
    width: WidthOption = 512,
    height: HeightOption = 512,
    frames: FramesOption = 65,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Time what a change of LoRAs and other patches costs, before the second step after it begins."""
    from rayltx.cli.bench.lora import LoraOptions, run_lora

    options = LoraOptions(workers, rounds, layers, model_width, width, height, frames, comfyui)
    run_lora(options, _output(as_json, plot))


@bench.command()
def dequant(
    types: Annotated[str, typer.Option(help="Of GGUF, separated by commas; or all.")] = "Q8_0,Q4_K",
    elements: Annotated[int, typer.Option(help="Of the tensor.")] = 2**24,
    rounds: RoundsOption = 7,
    threads: Annotated[int, typer.Option(help="Of the CPU.")] = 1,
    dtype: Annotated[ComputeDtype, typer.Option(help="Of the result.")] = ComputeDtype.float32,
    comfyui_gguf: Annotated[
        Optional[Path],  # noqa: UP045  (evaluated on Python 3.10)
        typer.Option("--comfyui-gguf", help="A checkout of ComfyUI-GGUF, to compare with."),
    ] = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Time the dequantisation of GGUF's blocks against a copy, the gguf package's, and ComfyUI-GGUF's."""
    from rayltx.cli.bench.dequant import DequantOptions, parse_types, run_dequant

    options = DequantOptions(parse_types(types), elements, rounds, threads, dtype.value, comfyui_gguf)
    run_dequant(options, _output(as_json, plot))


@bench.command()
def memory(
    comfyui: ComfyUIFolder,
    model: ModelOption = "LTX-2",
    ranks: RanksOption = "1,2,4",
    width: WidthOption = 1280,
    height: HeightOption = 704,
    frames: FramesOption = 121,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 2,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Measure the peak memory of a forward of ComfyUI's model on a rank, against the number of ranks. Linux."""
    from rayltx.cli.bench.counts import parse_ranks
    from rayltx.cli.bench.memory import MemoryOptions, run_memory

    options = MemoryOptions(model, parse_ranks(ranks), width, height, frames, layers, comfyui)
    run_memory(options, _output(as_json, plot))


@bench.command()
def decode(
    comfyui: ComfyUIFolder,
    kind: Annotated[str, typer.Option(help="convolutions, convolutions with noise, or diffusion.")] = "convolutions",
    workers: WorkersOption = 2,
    rounds: RoundsOption = 5,
    width: WidthOption = 640,
    height: HeightOption = 256,
    frames: FramesOption = 17,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Time what ranks decode together of what one decodes alone, with a small VAE of ComfyUI's."""
    from rayltx.cli.bench.decode import DecodeOptions, run_decode

    run_decode(DecodeOptions(kind, workers, rounds, width, height, frames, comfyui), _output(as_json, plot))


def _output(as_json: bool, plot: Path | None) -> Output:
    from rayltx.cli.bench.report import Output  # imports torch: not before the arguments are understood

    return Output(as_json, plot)
