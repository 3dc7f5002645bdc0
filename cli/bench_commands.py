"""The subcommands of `rayltx bench`, and their options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from rayltx.cli.option_types import ComfyUIOption, Device, DeviceOption

if TYPE_CHECKING:
    from rayltx.cli.bench.report import Output

bench = typer.Typer(no_args_is_help=True, help="Measure and count.")

WorkersOption = Annotated[int, typer.Option(help="How many workers, each with one thread of the CPU.")]
RoundsOption = Annotated[int, typer.Option(help="How often all is measured, in turn; medians are compared.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]
PlotOption = Annotated[
    Optional[Path],  # noqa: UP045  (evaluated on Python 3.10)
    typer.Option(help="Also as a picture, .png or .svg. Needs matplotlib."),
]

ModelOption = Annotated[str, typer.Option(help="LTX-Video, LTX-2, LTX-2.3 or LTX-2.5, in small.")]
WidthOption = Annotated[int, typer.Option(help="Pixels, a multiple of 32.")]
HeightOption = Annotated[int, typer.Option(help="Pixels, a multiple of 32.")]
FramesOption = Annotated[int, typer.Option(help="Pixel frames, 8k + 1.")]


@bench.command()
def counts(
    model: Annotated[str, typer.Option(help="LTX-Video, LTX-2, LTX-2.3 or LTX-2.5.")] = "LTX-2",
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 32.")] = 1280,
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 32.")] = 704,
    frames: Annotated[int, typer.Option(help="Pixel frames, 8k + 1.")] = 121,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks.")] = "1,2,4,8",
    chunks: Annotated[int, typer.Option(help="Feed-forward in so many portions; 0: automatic, 1: at once.")] = 1,
    comfyui: ComfyUIOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Count what a layer of the real width computes, exchanges and holds on a rank. Takes seconds, on any machine."""
    from rayltx.cli.bench.counts import CountOptions, parse_ranks, run_counts

    run_counts(CountOptions(model, width, height, frames, parse_ranks(ranks), chunks, comfyui, as_json))


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


def _output(as_json: bool, plot: Path | None) -> Output:
    from rayltx.cli.bench.report import Output  # imports torch: not before the arguments are understood

    return Output(as_json, plot)
