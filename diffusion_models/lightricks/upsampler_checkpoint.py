"""The upsamplers of LTX's latents in files."""

from __future__ import annotations

import os
from pathlib import Path

from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint, Header, among_tensors
from rayltx.errors import CheckpointError
from rayltx.whole_files import check_is_file

_MARK = "post_upsample_res_blocks."


def open_upsampler(path: str | os.PathLike[str]) -> Checkpoint:
    """Find an upsampler of latents in a file, reading its header alone.

    Raises CheckpointError where there is none, or the file is missing or damaged, or does not say how it is built.
    """
    path = Path(path)
    check_is_file(path)
    header = Header.of(path)
    if not any(name.startswith(_MARK) for name in header.tensors):
        raise CheckpointError(f"{path}: there is no upsampler of LTX's latents {among_tensors(header.tensors)}")
    checkpoint = header.checkpoint("", header.tensors)
    if not checkpoint.config:
        raise CheckpointError(
            f"{path}: there is no `config` in its metadata, which says how it is built; download it again"
        )
    return checkpoint
