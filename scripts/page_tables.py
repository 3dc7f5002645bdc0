"""Tables that scripts make, in the pages of `docs/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_END = "<!-- end -->"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def write_table(page: Path, script: str, lines: Sequence[str]) -> None:
    """Put a table in the place of the one that a script made before, between its marks."""
    begin = f"<!-- made by scripts/{script} -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(before + "\n".join([begin, *lines, _END]) + rest.partition(_END)[2])
