"""`rayltx convert SOURCE TARGET`: between .safetensors and .gguf."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rayltx.expansion.comfyui_gguf.convert import convert


def run_convert(source: Path, target: Path, type: str | None) -> None:
    """Convert, with a bar. Raises what `convert` raises."""
    console = Console(width=max(Console().width, 100))
    started = time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        convert(
            source,
            target,
            type,
            progress=lambda done, total, name: bar.update(task, completed=done, total=total, description=name),
        )
    seconds = time.monotonic() - started
    before, after = source.stat().st_size, target.stat().st_size
    console.print(
        f"[bold]{target.name}[/]: {after / 2**20:.1f} MiB, {after / before:.0%} of {source.name}, in {seconds:.1f} s",
        highlight=False,
    )
