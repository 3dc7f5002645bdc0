"""What a subcommand of `rayltx bench` has measured, on which machine, and how it is shown: a table, JSON, a plot."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rayltx.cli.bench.machine import Load, machine
from rayltx.cli.bench.measurements import Arm, Clock, Report
from rayltx.cli.packages import require_packages
from rayltx.errors import InputError

_PLOTS = (".png", ".svg")


@dataclass(frozen=True)
class Output:
    """How a report is shown."""

    as_json: bool = False
    plot: Path | None = None

    def check(self) -> None:
        """Before anything is measured. Raises InputError for a file of another kind, and MissingPackageError."""
        if self.plot is None:
            return
        if self.plot.suffix.lower() not in _PLOTS:
            raise InputError(f"plot={self.plot} must end in {' or '.join(_PLOTS)}")
        if not self.plot.absolute().parent.is_dir():
            raise InputError(f"plot={self.plot}: there is no such folder; make it first")
        require_packages(("matplotlib",), "bench --plot")


def at_least(**least: tuple[float, float]) -> None:
    """name=(value, least). Raises InputError for the first value that is below."""
    for name, (value, lowest) in least.items():
        if not value >= lowest:
            raise InputError(f"{name}={value} must be at least {lowest:g}")


def in_turn(arms: Mapping[str, Callable[[], float]], rounds: int) -> tuple[Arm, ...]:
    """What each arm returns in each round, after one round that does not count.

    Each round begins with another arm: what one leaves behind, such as threads that spin, slows the next one down.
    """
    samples: dict[str, list[float]] = {name: [] for name in arms}
    turn = list(arms.items())
    for number in range(rounds + 1):
        first = number % len(turn)
        for name, run in turn[first:] + turn[:first]:
            sample = run()
            if number:
                samples[name].append(sample)
    return tuple(Arm(name, tuple(each)) for name, each in samples.items())


@contextlib.contextmanager
def reporting(
    name: str, options: Mapping[str, Any], output: Output, processes: int = 1, comfyui: Path | None = None
) -> Iterator[Report]:
    """A report that is filled within the `with`, and shown behind it.

    processes: how many of this measurement's own are busy, each with one thread. Raises as `Output.check`.
    """
    output.check()
    load = Load.begin(processes)
    report = Report(name, options, machine(comfyui), load)
    began = time.monotonic()
    yield report
    report.load = load.ended(time.monotonic() - began)
    if output.as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        _print(report)
    if output.plot is not None:
        from rayltx.cli.bench.plot import save_plot

        save_plot(report, output.plot)


def _print(report: Report) -> None:
    console = Console(width=max(Console().width, 130), highlight=False)
    for line in (str(report.machine), str(report.load)):
        console.print(line, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD)
    for column in ("", "median", "from", "to", "", "of the first"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for each in report.measurements:
        table.add_row(each.what, style="bold")
        for number, arm in enumerate(each.arms):
            ratio = report.ratio(each, arm)
            numbers = [_number(arm.median), *(_number(most(arm.samples)) for most in (min, max))]
            if len(arm.samples) == 1:
                numbers[1:] = "", ""
            told = "" if ratio is None or number == 0 else f"{ratio:.3f}"
            table.add_row(f"  {arm.name}", *numbers, each.unit, told)
        table.add_section()
    if report.measurements:
        console.print(table)
    for name, value in report.found.items():
        console.print(f"{name}: {_number(value) if isinstance(value, float) else value}")
    for line in _remarks(report):
        console.print(line, soft_wrap=True)


def _remarks(report: Report) -> Sequence[str]:
    clocks = {each.clock for each in report.measurements}
    if not report.load.others or clocks <= {Clock.NONE}:
        return report.remarks
    told = "other work ran on this machine: "
    told += "its times are not to be trusted, and wall clocks are not compared" if Clock.WALL in clocks else (
        "processor times are compared, which it lengthens a little; run it again alone before you rely on them"
    )  # fmt: skip
    return [*report.remarks, told]


def _number(value: float) -> str:
    """With about four digits."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
