"""The subcommands and their options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from rayltx.about import VERSION
from rayltx.cli import exit_codes
from rayltx.cli.bench_commands import bench
from rayltx.cli.option_types import (
    AddressOption,
    CfgDegreeOption,
    ComfyUIOption,
    Device,
    DeviceOption,
    Dtype,
    GpusOption,
    RingOption,
    SharesOption,
    StoreOption,
    UlyssesOption,
    Workers,
)

if TYPE_CHECKING:
    from rayltx.cli.cluster_options import ClusterOptions

_CFG, _DEMO_CFG = 3.0, 1.5

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LTX video models on several workers, with the picture that one gives.",
)


app.add_typer(bench, name="bench")


def _version(value: bool) -> None:
    if value:
        print(VERSION)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what happens.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    logging.getLogger("rayltx").setLevel(logging.INFO if verbose else logging.WARNING)


@app.command()
def generate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="An LTX .safetensors file; without one, the demo's.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help='What is to be seen; for the demo checkpoint: "red circle right", ...')
    ] = None,
    negative: Annotated[str, typer.Option(help="What is not, for a text encoder.")] = "",
    conditioning: Annotated[
        Path | None, typer.Option(help="Text conditioning, .safetensors; see the documentation.")
    ] = None,
    text_encoder: Annotated[
        list[Path] | None, typer.Option(help="A file of the model's text encoder, for --comfyui. May be repeated.")
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="The file of the VAE, for --comfyui; without: the checkpoint.")
    ] = None,
    audio_vae: Annotated[
        Path | None, typer.Option(help="The file of the VAE of sound, for --comfyui; without: the checkpoint.")
    ] = None,
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 32.")] = 192,
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 32.")] = 192,
    frames: Annotated[int, typer.Option(help="Pixel frames, 8k + 1.")] = 41,
    frame_rate: Annotated[float, typer.Option(help="Frames per second.")] = 24.0,
    steps: Annotated[int, typer.Option(help="Sampling steps on LTX's own schedule.")] = 20,
    sigmas: Annotated[str | None, typer.Option(help='Sigmas instead of steps: "1,0.7,0.3,0".')] = None,
    cfg: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1: none. Left out: 3, and 1.5 without a checkpoint.")
    ] = None,
    stochastic: Annotated[
        bool | None, typer.Option(help="New noise in each step. Left out: without a checkpoint alone.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    workers: Workers = 0,
    ulysses: UlyssesOption = 0,
    ring: RingOption = 0,
    cfg_degree: CfgDegreeOption = 0,
    shares: SharesOption = "",
    chunks: Annotated[int, typer.Option(help="Feed-forward in so many portions; 0: automatic, 1: at once.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Compute in this; file: as the weights are.")] = Dtype.file,
    device: DeviceOption = Device.auto,
    gpus: GpusOption = "",
    address: AddressOption = "local",
    object_store_gb: StoreOption = 0.0,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="File to write: .mp4, .gif, .png, .safetensors. May be repeated."),
    ] = None,
    comfyui: ComfyUIOption = None,
    verify: Annotated[bool, typer.Option(help="Sample again on one worker, and print the difference.")] = False,
) -> None:
    """Generate a clip."""
    from rayltx.cli.generate import run_generate
    from rayltx.cli.generate_options import GenerateOptions

    # The demo's small model is less sure of itself: with the same noise all the way down its outlines wobble.
    is_demo = checkpoint is None
    cfg = (_DEMO_CFG if is_demo else _CFG) if cfg is None else cfg
    stochastic = is_demo if stochastic is None else stochastic
    run_generate(
        GenerateOptions(
            checkpoint=checkpoint, prompt=prompt, negative=negative, conditioning=conditioning,
            text_encoders=text_encoder or [], vae=vae, audio_vae=audio_vae, width=width, height=height, frames=frames,
            frame_rate=frame_rate, steps=steps, sigmas=sigmas, cfg=cfg, stochastic=stochastic, seed=seed, chunks=chunks,
            dtype=dtype.value, outputs=output or [Path("output/rayltx.mp4")], verify=verify,
            comfyui=comfyui, cluster=_cluster_options(
                workers, device, gpus, address, object_store_gb, (ulysses, ring, cfg_degree or (0 if cfg != 1.0 else 1)), shares
            ),
        )
    )  # fmt: skip


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A checkpoint.")],
    width: Annotated[int, typer.Option(help="For the estimate of memory.")] = 1280,
    height: Annotated[int, typer.Option(help="For the estimate of memory.")] = 704,
    frames: Annotated[int, typer.Option(help="For the estimate of memory.")] = 121,
) -> None:
    """Say what a file is, what it needs, and which degrees fit."""
    from rayltx.cli.info import run_info

    run_info(file, width, height, frames)


@app.command()
def plan(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="An LTX file, for its shape and size; LTX-2's shape without.")
    ] = None,
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 32.")] = 1280,
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 32.")] = 704,
    frames: Annotated[int, typer.Option(help="Pixel frames, 8k + 1.")] = 121,
    workers: Annotated[int, typer.Option(help="The most cards.")] = 8,
    cfg: Annotated[float, typer.Option(help="Classifier-free guidance; 1: none, and one row a clip.")] = 1.0,
    clips: Annotated[int, typer.Option(help="In a batch.")] = 1,
    tflops: Annotated[float, typer.Option(help="Of a card, in 1e12 a second; 0: measured here, or assumed.")] = 0.0,
    link: Annotated[float, typer.Option(help="Between cards, in 1e9 bytes a second; 0: assumed.")] = 0.0,
    memory: Annotated[float, typer.Option(help="Of a card, in GiB; 0: as here, or assumed.")] = 0.0,
    with_ring: Annotated[bool, typer.Option("--with-ring", help="Also the ways with a ring.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what a step takes and holds on 1 to so many cards, for each way to share it, and which is best."""
    from rayltx.cli.plan import PlanOptions, run_plan

    run_plan(
        PlanOptions(checkpoint, width, height, frames, workers, cfg, clips, tflops, link, memory, with_ring, as_json)
    )


@app.command()
def check(
    workers: Annotated[int, typer.Option(help="The most workers to check.")] = 4,
    device: DeviceOption = Device.auto,
    gpus: GpusOption = "",
    model: Annotated[
        list[str] | None, typer.Option(help="LTX-Video, LTX-2, LTX-2.3 or LTX-2.5; may be repeated.")
    ] = None,
    comfyui: ComfyUIOption = None,
) -> None:
    """Print the exactness table: every model, rank count and mask against one process, on this machine."""
    from rayltx.cli.check import run_check

    exact = run_check(_cluster_options(workers, device, gpus), model or [], comfyui)
    if not exact:
        raise typer.Exit(exit_codes.FAILURE)


@app.command()
def doctor(
    checkpoint: Annotated[Path | None, typer.Argument(help="The file that is to be loaded, for its size.")] = None,
    width: Annotated[int, typer.Option(help="Pixels, for the prediction.")] = 1280,
    height: Annotated[int, typer.Option(help="Pixels, for the prediction.")] = 704,
    frames: Annotated[int, typer.Option(help="For the prediction.")] = 121,
    workers: Workers = 0,
    device: DeviceOption = Device.auto,
    gpus: GpusOption = "",
    comfyui: ComfyUIOption = None,
    gpu_report: Annotated[
        Path | None,
        typer.Option(
            help="Also try everything that a GPU does for RayLTX, and write all of it to this file, for a report."
        ),
    ] = None,
) -> None:
    """Say what this machine gives, what is wrong with it, and whether several devices are faster than one."""
    from rayltx.cli.doctor import Question, run_doctor

    question = Question(checkpoint, comfyui, width, height, frames)
    healthy = run_doctor(_cluster_options(workers, device, gpus), question, gpu_report)
    if not healthy:
        raise typer.Exit(exit_codes.FAILURE)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .safetensors or .gguf file.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .gguf or .safetensors.")],
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Q8_0, Q4_0, F16, ... for .gguf; float32, float16, bfloat16 for .safetensors. Without: unrounded.",
        ),
    ] = None,
) -> None:
    """Convert between safetensors and GGUF, with all metadata."""
    from rayltx.cli.convert import run_convert

    run_convert(source, target, type)


def _cluster_options(
    workers: int,
    device: Device,
    gpus: str,
    address: str = "local",
    object_store_gb: float = 0.0,
    degrees: tuple[int, int, int] = (0, 0, 1),
    shares: str = "",
) -> ClusterOptions:
    from rayltx.cli.cluster_options import ClusterOptions  # imports torch: not before the arguments are understood

    return ClusterOptions(workers, *degrees, shares, device.value, gpus, address, object_store_gb)
