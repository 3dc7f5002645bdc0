"""All checks, each in a process of its own and within a limit, a tiny sampling on real workers, and the file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console

from rayltx.cli.check import worst_of
from rayltx.cli.gpu_report import shared_device
from rayltx.cli.gpu_report.checks import CHECKS
from rayltx.devices import DeviceKind, kind_of
from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE
from rayltx.distributed_worker.machine_facts import Fact
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import InputError, RayLTXError
from rayltx.sequence_parallel.partition import ParallelConfig
from rayltx.whole_files import appearing_whole

Check = Callable[[DeviceKind], Iterable[Fact]]
_LIMIT_S = 300.0  # of one check
_SAMPLED_VERSION = "LTX-2.3"


def check_target(path: Path) -> None:
    """Raises InputError for a file that cannot be written."""
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(
            f"gpu-report={path}: there is no such folder, or it is one; name a file in a folder that exists"
        )


def write_report(
    path: Path, known: list[Fact], request: ClusterRequest, config: ParallelConfig, comfyui: Path | None
) -> list[Fact]:
    """Run everything, print it as it comes, and write it to a JSON file with what is known. Returns what was found here.

    path: one that `check_target` has let through.
    """
    console, found = Console(width=max(Console().width, 100)), []
    for check in (*CHECKS, shared_device.exchange_on_one_device):
        with Console(stderr=True).status(check.__name__.replace("_", " ")):
            facts = run_check_apart(check, request.device)
        found += _printed(console, facts)
    with Console(stderr=True).status("a tiny model on the workers"):
        facts = [_tiny_model(request, config, comfyui)]
    found += _printed(console, facts)
    report = {
        "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "facts": [dataclasses.asdict(fact) for fact in (*known, *found)],
    }
    with appearing_whole(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}")
    return found


def _printed(console: Console, facts: list[Fact]) -> list[Fact]:
    for fact in facts:
        console.print(f"  {fact}" + (f"\n    [bold red]{fact.problem}[/]" if fact.problem else ""), highlight=False)
    return facts


def run_check_apart(check: Check, device: str, limit_s: float = _LIMIT_S) -> list[Fact]:
    """A check's facts, whatever it does to its process."""
    # Forked from a process that has imported torch, and has touched no device: importing takes longer than most checks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([shared_device.__name__, "rayltx.cli.gpu_report.checks"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(check, device, theirs))
    process.start()
    theirs.close()
    name = check.__name__.replace("_", " ")
    try:
        if not ours.poll(limit_s):
            return [Fact(name, "no answer", f"it took more than {limit_s:.0f} s and was ended: report this")]
        facts: list[Fact] = ours.recv()
        return facts
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return [Fact(name, "its process died", f"it ended with {how}: report this")]
    finally:
        if process.is_alive():
            process.join(10.0)
        if process.is_alive():
            process.kill()
        process.join()


def _answer(check: Check, device: str, answers: Connection) -> None:
    try:
        facts = list(check(kind_of(device)))
    except Exception as error:  # whatever a driver says is what the report is for
        last = traceback.format_exc(limit=-3)
        facts = [Fact(check.__name__.replace("_", " "), f"{type(error).__name__}: {error}", last)]
    answers.send(facts)


def _tiny_model(request: ClusterRequest, config: ParallelConfig, comfyui: Path | None) -> Fact:
    """A tiny model of every kind of input on the real workers, against one process."""
    name = f"tiny {_SAMPLED_VERSION} on {config.world_size} workers"
    try:
        with tempfile.TemporaryDirectory() as folder:
            worst, count = worst_of(request, [_SAMPLED_VERSION], config, comfyui, Path(folder))
    except RayLTXError as error:
        return Fact(name, "failed", str(error))
    problem = "" if worst <= TOLERANCE else f"more than {TOLERANCE:.0e}: report this"
    return Fact(name, f"largest error {worst:.1e} in {count} kinds of input, float32", problem)
