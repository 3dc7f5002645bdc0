"""`rayltx check`: the exactness table, on this machine, through the real workers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rayltx.cli.cluster_options import ClusterOptions
from rayltx.cli.packages import require_packages
from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE
from rayltx.diffusion_models.lightricks.tiny_configs import TRANSFORMER_CONFIGS
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import InputError
from rayltx.sequence_parallel.partition import ParallelConfig


def degrees_up_to(workers: int) -> list[ParallelConfig]:
    """Every ulysses x ring x cfg of 1 to `workers` ranks, and one with unequal shares."""
    configs = [
        ParallelConfig(ranks // ring // rows, ring, rows)
        for ranks in range(1, workers + 1)
        for ring in range(1, ranks + 1)
        for rows in (1, 2)
        if ranks % (ring * rows) == 0
    ]
    return [*configs, ParallelConfig(workers, shares=tuple(range(1, workers + 1)))] if workers > 1 else configs


def _column(config: ParallelConfig) -> str:
    degrees = (config.ulysses_degree, config.ring_degree, config.cfg_degree)
    name = " x ".join(map(str, degrees[: 2 + (config.cfg_degree > 1)]))
    return f"{name}\n{':'.join(map(str, config.shares))}" if config.shares else name


Errors = dict[str, "float | str"]  # by case; what the model said, in place of a number, where it could not be run


def run_check(options: ClusterOptions, versions: list[str], comfyui: Path | None) -> bool:
    """Print the table; whether all of it is within the tolerance.

    Tiny random models of every LTX version run on the workers: of diffusers, compared with its untouched transformer in
    this process; or of the ComfyUI at `comfyui`, compared with themselves in one process. Raises InputError for a version
    that is not known.
    """
    if options.workers < 1:
        raise InputError(f"workers={options.workers} must be at least 1: the most that are checked")
    request, _ = options.resolve()
    if comfyui is None:
        _check_versions(versions)
        require_packages(("diffusers",), "check")
    configs = degrees_up_to(request.workers)
    title = f"ComfyUI at {comfyui}" if comfyui else "diffusers"
    table = Table(
        box=SIMPLE_HEAD,
        title=f"Relative error against {title} in one process, float32 (ulysses x ring x cfg; shares)",
        title_justify="left",
    )
    table.add_column("model", no_wrap=True)
    table.add_column("case", no_wrap=True)
    for config in configs:
        table.add_column(_column(config), justify="right", no_wrap=True)

    worst = 0.0
    progress = Progress(console=Console(stderr=True), transient=True)
    with tempfile.TemporaryDirectory() as folder, progress:
        task = progress.add_task("starting the workers", total=None)

        def on_config(version: str, number: int) -> None:
            progress.update(task, description=f"checking {version}", completed=number, total=len(configs))

        if comfyui:
            found = _comfyui_errors(comfyui, request, Path(folder), versions, configs, on_config)
        else:
            found = _diffusers_errors(request, Path(folder), versions, configs, on_config)
        for version, by_config in found:
            cases = dict.fromkeys(case for errors in by_config for case in errors)  # some are for several ranks alone
            for case in cases:
                row = [errors.get(case) for errors in by_config]
                worst = max(worst, *(math.inf if isinstance(error, str) else error or 0.0 for error in row))
                table.add_row(version, case, *map(_cell, row))
    Console(width=max(Console().width, 56 + 10 * len(configs))).print(table)
    exact = worst <= TOLERANCE
    print(f"largest error {worst:.1e}, allowed {TOLERANCE:.0e}: {'exact' if exact else 'NOT EXACT'}")
    return exact


def worst_of(
    request: ClusterRequest, versions: list[str], config: ParallelConfig, comfyui: Path | None, folder: Path
) -> tuple[float, int]:
    """(largest error, number of cases) of tiny models on the workers, for one division of the work. folder: for their files.

    The error is infinite where a model could not be run at all.
    """

    def on_config(version: str, number: int) -> None:
        pass

    if comfyui is None:
        require_packages(("diffusers",), "doctor")
        found = _diffusers_errors(request, folder, versions, [config], on_config)
    else:
        found = _comfyui_errors(comfyui, request, folder, versions, [config], on_config)
    errors = [error for _, by_config in found for error in by_config[0].values()]
    return max(math.inf if isinstance(error, str) else error for error in errors), len(errors)


def _check_versions(versions: list[str]) -> None:
    unknown = sorted(set(versions) - set(TRANSFORMER_CONFIGS))
    if unknown:
        raise InputError(f"model={', '.join(unknown)} must be one of {', '.join(TRANSFORMER_CONFIGS)}")


def _cell(error: float | str | None) -> str:
    if error is None:
        return ""
    if isinstance(error, str):
        return f"[bold red]{error}[/]"
    return f"{error:.1e}" if error <= TOLERANCE else f"[bold red]{error:.1e}[/]"


def _comfyui_errors(
    root: Path,
    request: ClusterRequest,
    folder: Path,
    versions: list[str],
    configs: list[ParallelConfig],
    on_config: Callable[[str, int], None],
) -> Iterator[tuple[str, list[Errors]]]:
    from rayltx.comfy_dist.main_process.headless import comfyui_cluster, comfyui_errors

    with comfyui_cluster(root, request) as cluster:
        yield from comfyui_errors(cluster, folder, versions, configs, on_config)


def _diffusers_errors(
    request: ClusterRequest,
    folder: Path,
    versions: list[str],
    configs: list[ParallelConfig],
    on_config: Callable[[str, int], None],
) -> Iterator[tuple[str, list[Errors]]]:
    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel  # these take seconds to import
    from rayltx.diffusion_models.lightricks.exactness import cases_for, untouched_forward, worst_error
    from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint

    with Cluster.start(request) as cluster:
        for version in versions or TRANSFORMER_CONFIGS:
            path = folder / f"{version}.safetensors"
            untouched = save_tiny_checkpoint(path, version)
            checkpoint = open_checkpoint(path)
            model = DiffusersModel.of_checkpoint(checkpoint)
            remote = cluster.load(checkpoint, model)
            cases = cases_for(model)
            references = {case: untouched_forward(untouched, model, case.inputs(model)) for case in cases}
            by_config: list[Errors] = []  # forming a group costs more than a forward
            for number, config in enumerate(configs):
                on_config(version, number)
                answers = {case: remote.forward(case.inputs(model), config) for case in cases}
                by_config.append({case.name: worst_error(answers[case], references[case]) for case in cases})
            remote.release()
            yield version, by_config
