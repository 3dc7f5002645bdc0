"""`rayltx doctor`: what this machine gives, what is wrong with it, and whether several devices are worth it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rayltx.cli.cluster_options import ClusterOptions
from rayltx.cli.gpu_report.report import check_target, write_report
from rayltx.cli.plan import audio_tokens, model_of
from rayltx.devices import CPU, DeviceKind
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.step_cost import ModelShape
from rayltx.diffusion_models.lightricks.step_plan import ASSUMED_CARDS, Cards, Work, plan
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.device_speed import flops_per_s
from rayltx.distributed_worker.machine_facts import Fact, machine_facts
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.worker import LinkReport
from rayltx.errors import ClusterError, UserError
from rayltx.sequence_parallel.partition import ParallelConfig

_NOTHING_HOST = (
    "rayltx.diffusion_models.lightricks.random_weights:randomise"  # nothing is loaded: an import that is cheap
)


@dataclasses.dataclass(frozen=True)
class Question:
    """What the machine is to be looked at for."""

    checkpoint: Path | None
    comfyui: Path | None
    width: int
    height: int
    frames: int


def run_doctor(options: ClusterOptions, question: Question, gpu_report: Path | None) -> bool:
    """Print what was found, and write it if asked. Returns whether nothing is wrong.

    Raises CheckpointError for a file that is not a whole LTX checkpoint, InputError for sizes, and DeviceError and
    ParallelConfigError for what was asked of the workers.
    """
    if gpu_report is not None:
        check_target(gpu_report)
    shape = LatentShape.from_pixels(question.width, question.height, question.frames)
    request, config = options.resolve()
    if question.comfyui is not None:
        record = question.comfyui / "user" / "rayltx" / "machine.json"
        request = dataclasses.replace(request, machine_record=str(record))
    model, weight_bytes = model_of(question.checkpoint)
    facts = machine_facts(request, weight_bytes)
    if question.comfyui is not None:
        facts.insert(1, _comfyui(question.comfyui))
    _print(facts, "This machine")
    if any(fact.name == "devices" and fact.problem for fact in facts):
        return False  # no worker would start

    link: list[Fact] = []
    try:
        rate = flops_per_s(request.kind)
    except RuntimeError as error:
        print(f"the first device has no memory to be measured: {str(error).splitlines()[0]}")
        return False
    console = Console(stderr=True)
    if config.world_size > 1:
        with console.status("starting the workers, to measure between them"):
            link += _measured(request, config, shape, model, weight_bytes, rate)
        _print(link, "Between the workers")
    facts += link
    if gpu_report is not None:
        facts += write_report(gpu_report, facts, request, config, question.comfyui)
    problems = [fact for fact in facts if fact.problem]
    print(f"{len(problems)} of {len(facts)} need attention" if problems else "nothing needs attention")
    return not problems


def _print(facts: list[Fact], title: str) -> None:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for fact in facts:
        table.add_row(fact.name, fact.value + (f"\n[bold red]{fact.problem}[/]" if fact.problem else ""))
    Console(width=max(Console().width, 100)).print(table)


def _comfyui(root: Path) -> Fact:
    """By its files: this Python may not be ComfyUI's."""
    from rayltx.comfy_dist.comfy_environment import is_comfyui, version_of

    version = version_of(root)
    if not is_comfyui(root) or version is None:
        return Fact("ComfyUI", str(root), "there is no ComfyUI in that folder; name the one that has comfy/ in it")
    return Fact("ComfyUI", f"{version or 'of an unknown version'} in {root}")


def _measured(
    request: ClusterRequest,
    config: ParallelConfig,
    shape: LatentShape,
    model: ModelShape,
    weight_bytes: int,
    flops_per_s: float,
) -> list[Fact]:
    try:
        with Cluster.start(dataclasses.replace(request, host=_NOTHING_HOST)) as cluster:
            cluster.group.form(config)
            link = cluster.group.link_report
    except (ClusterError, UserError) as error:
        return [Fact("link", "not measured", str(error))]
    assert link is not None, "several ranks report"
    work = Work(model, weight_bytes, shape.num_tokens, audio_tokens(model, shape))
    return [Fact("link", str(link)), prediction(link, config, work, flops_per_s, request.kind)]


def prediction(link: LinkReport, config: ParallelConfig, work: Work, flops_per_s: float, kind: DeviceKind) -> Fact:
    """Whether sharing a step pays, by what was measured."""
    ranks = config.world_size
    if kind.name == CPU:
        return Fact(f"{ranks} workers", "they share this machine's cores: exact, and no faster than one")
    exchange = link.exchange
    cards = Cards(
        flops_per_s, exchange.bytes_per_s, exchange.small_s, kind.total_bytes(), ASSUMED_CARDS.host_bytes_per_s
    )
    found = plan(work, cards, config)
    value = (
        f"a step of {work.video_tokens} video tokens about {found.speedup:.2f} times as fast as on one "
        f"({found.efficiency:.0%} of {ranks} times), by {flops_per_s / 1e12:.2f} TFLOP/s measured"
    )
    if found.speedup > 1:
        return Fact(f"{ranks} workers", value)
    return Fact(
        f"{ranks} workers",
        value,
        f"one {kind.name} would be as fast: {found.bound_by} at this size; use GPU 1",
    )
