"""A report as a picture: every sample of every arm, and the medians."""

from __future__ import annotations

from pathlib import Path

from rayltx.cli.bench.measurements import Report


def save_plot(report: Report, path: Path) -> None:
    """Write .png or .svg. Needs matplotlib."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    rows = len(report.measurements)
    height = 1.2 + sum(0.4 + 0.28 * len(each.arms) for each in report.measurements)
    figure = Figure(figsize=(9, height), layout="constrained")
    figure.suptitle(f"rayltx bench {report.name}\n{report.machine.cpu}, {report.load}", fontsize=8)
    grid = figure.subplots(
        rows, 1, squeeze=False, gridspec_kw={"height_ratios": [1 + len(each.arms) for each in report.measurements]}
    )
    for axes, each in zip(grid[:, 0], report.measurements):
        names = [arm.name for arm in each.arms]
        axes.barh(names, [arm.median for arm in each.arms], color="#9bb7d4")
        for arm in each.arms:
            axes.plot(arm.samples, [arm.name] * len(arm.samples), "|", color="#1f3a5f", markersize=9)
        axes.invert_yaxis()
        axes.set_title(each.what, fontsize=8, loc="left")
        axes.set_xlabel(each.unit, fontsize=7)
        axes.tick_params(labelsize=7)
    figure.savefig(path)
