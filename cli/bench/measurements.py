"""What is measured: arms of samples, and all of a subcommand's, with the machine that they are of."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from rayltx.cli.bench.machine import Load, Machine


class Clock(str, Enum):
    """What samples are read from, which says what else disturbs them."""

    NONE = "none"  # bytes, say
    PROCESSOR = "processor"  # time that a process or thread was run: others slow it a little, by caches
    WALL = "wall"  # all that passed: others' work is in it


@dataclass(frozen=True)
class Arm:
    """One of several things that are compared."""

    name: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Measurement:
    """has_ratios: whether the arms are to be divided by the first of them; shares, which may be 0, are not."""

    what: str
    unit: str
    clock: Clock
    arms: tuple[Arm, ...]
    has_ratios: bool = True

    def of_first(self, arm: Arm) -> float | None:
        """The ratio of the medians."""
        first = self.arms[0].median
        return arm.median / first if first and self.has_ratios else None


@dataclass
class Report:
    """found: what was established besides the samples, by name. remarks: how to read it."""

    name: str
    options: Mapping[str, Any]
    machine: Machine
    load: Load
    measurements: list[Measurement] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def ratio(self, measurement: Measurement, arm: Arm) -> float | None:
        """None where there is no verdict: of wall clocks while other work ran on the machine."""
        if measurement.clock is Clock.WALL and self.load.others:
            return None
        return measurement.of_first(arm)

    def as_json(self) -> dict[str, Any]:
        measurements = [
            {
                "what": each.what,
                "unit": each.unit,
                "clock": each.clock.value,
                "arms": [
                    {"name": arm.name, "samples": arm.samples, "median": arm.median, "of_first": self.ratio(each, arm)}
                    for arm in each.arms
                ],
            }
            for each in self.measurements
        ]
        return {
            "bench": self.name,
            "options": {name: str(value) if isinstance(value, Path) else value for name, value in self.options.items()},
            "machine": asdict(self.machine),
            "load": {**asdict(self.load), "other_work": self.load.others},
            "measurements": measurements,
            "found": self.found,
            "remarks": self.remarks,
        }
