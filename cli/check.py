"""`rayltx check`: the exactness table, on this machine, through the real workers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rayltx.cli.cluster_options import ClusterOptions
from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.distributed_worker.cluster import Cluster
from rayltx.errors import InputError
from rayltx.sequence_parallel.partition import ParallelConfig

TOLERANCE = 2e-6  # float32, relative error of the norm


def degrees_up_to(workers: int) -> list[ParallelConfig]:
    """Every ulysses x ring of 1 to `workers` ranks."""
    return [
        ParallelConfig(ranks // ring, ring)
        for ranks in range(1, workers + 1)
        for ring in range(1, ranks + 1)
        if ranks % ring == 0
    ]


def run_check(options: ClusterOptions, versions: list[str]) -> bool:
    """Print the table; whether all of it is within the tolerance.

    Tiny random models of every LTX version run on the workers, and are compared with diffusers' untouched transformer
    in this process. Raises InputError for an unknown version.
    """
    request, _ = options.resolve()

    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel  # these take seconds to import
    from rayltx.diffusion_models.lightricks.exactness import cases_for, untouched_forward, worst_error
    from rayltx.diffusion_models.lightricks.tiny_models import TRANSFORMER_CONFIGS, save_tiny_checkpoint

    unknown = sorted(set(versions) - set(TRANSFORMER_CONFIGS))
    if unknown:
        raise InputError(f"model={', '.join(unknown)} must be one of {', '.join(TRANSFORMER_CONFIGS)}")
    versions = versions or list(TRANSFORMER_CONFIGS)
    configs = degrees_up_to(request.workers)
    table = Table(
        box=SIMPLE_HEAD,
        title="Relative error against diffusers in one process, float32 (ulysses x ring)",
        title_justify="left",
    )
    table.add_column("model", no_wrap=True)
    table.add_column("case", no_wrap=True)
    for config in configs:
        table.add_column(f"{config.ulysses_degree} x {config.ring_degree}", justify="right", no_wrap=True)

    worst = 0.0
    progress = Progress(console=Console(stderr=True), transient=True)
    with Cluster.start(request) as cluster, tempfile.TemporaryDirectory() as folder, progress:
        task = progress.add_task("checking", total=None)
        cluster.workers()
        for version in versions:
            path = Path(folder) / f"{version}.safetensors"
            untouched = save_tiny_checkpoint(path, version)
            checkpoint = open_checkpoint(path)
            model = DiffusersModel.of_checkpoint(checkpoint)
            remote = cluster.load(checkpoint, model)
            cases = cases_for(model)
            references = [untouched_forward(untouched, model, case.inputs(model)) for case in cases]
            errors = []  # by config: forming a group costs more than a forward
            for number, config in enumerate(configs):
                progress.update(task, description=f"checking {version}", completed=number, total=len(configs))
                answers = [remote.forward(case.inputs(model), config) for case in cases]
                errors.append([worst_error(answer, reference) for answer, reference in zip(answers, references)])
            remote.release()
            for number, case in enumerate(cases):
                row = [by_case[number] for by_case in errors]
                worst = max(worst, *row)
                cells = [f"{error:.1e}" if error <= TOLERANCE else f"[bold red]{error:.1e}[/]" for error in row]
                table.add_row(version, case.name, *cells)
    Console(width=max(Console().width, 42 + 10 * len(configs))).print(table)
    exact = worst <= TOLERANCE
    print(f"largest error {worst:.1e}, allowed {TOLERANCE:.0e}: {'exact' if exact else 'NOT EXACT'}")
    return exact
