"""Files that are there whole or not at all; and files that are none."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayltx.errors import CheckpointError, InputError


@contextmanager
def appearing_whole(target: Path, ending: str = ".part") -> Iterator[Path]:
    """A name next to `target` to write to. The file takes its place when the block ends, and is removed if that fails.

    ending: of that name, so that no one takes the file for a whole one; where what writes it goes by the ending,
    `target`'s own. Raises InputError if there is no such folder.
    """
    if not target.parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.parent}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{ending}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode & 0o777  # as the process's umask has it; some writers make private files
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # an interrupt, too
        temporary.unlink(missing_ok=True)
        raise


def check_is_file(path: Path) -> None:
    """Raises CheckpointError for what is not there, or is no file."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
