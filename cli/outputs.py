"""Write what was generated: .mp4, .gif, a .png contact sheet, or the latent as .safetensors."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from rayltx.cli.packages import require_packages
from rayltx.errors import InputError
from rayltx.whole_files import appearing_whole

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

LATENT_SUFFIX = ".safetensors"
PIXEL_SUFFIXES = (".mp4", ".gif", ".png")
_MODULES = {".mp4": ("imageio", "av"), ".gif": ("imageio", "PIL"), ".png": ("PIL",)}  # that write such a file
_SHEET_FRAMES = 12
_SHEET_COLUMNS = 6
_GAP = 4  # pixels between the frames of a sheet


def check_outputs(paths: list[Path], has_pixels: bool) -> None:
    """Raises InputError and MissingPackageError for what cannot be written, before anything is computed."""
    for path in paths:
        if path.is_dir():
            raise InputError(f"output {path}: is a folder; name a file in it")
        if path.suffix.lower() not in (*PIXEL_SUFFIXES, LATENT_SUFFIX):
            raise InputError(f"output {path}: must end with {', '.join(PIXEL_SUFFIXES)} or {LATENT_SUFFIX}")
        if path.suffix.lower() != LATENT_SUFFIX and not has_pixels:
            raise InputError(
                f"output {path}: this checkpoint's latents become pixels through its VAE, which is not run here; write "
                "a .safetensors latent, and decode it in ComfyUI"
            )
        require_packages(_MODULES.get(path.suffix.lower(), ()), f"output {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise InputError(f"output {path}: cannot be written there ({error.strerror})") from error


def write_output(
    path: Path, latents: dict[str, Tensor], clip: Tensor | None, frame_rate: float, about: dict[str, str]
) -> None:
    """Write one file, whole or not at all.

    latents: (1, C, F, H, W) and so on, by name. clip: (pixel frames, height, width, 3) in [0, 1]; for pixels.
    """
    with appearing_whole(path, path.suffix) as temporary:
        if path.suffix.lower() == LATENT_SUFFIX:
            save_file({name: latent.contiguous() for name, latent in latents.items()}, temporary, about)
        else:
            assert clip is not None
            _write_pixels(temporary, (clip * 255.0).round().to(torch.uint8).numpy(), frame_rate, about)


def _write_pixels(path: Path, frames: np.ndarray, frame_rate: float, about: dict[str, str]) -> None:
    """frames: (F, H, W, 3) uint8."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        contact_sheet(frames).save(path, pnginfo=_png_text(about))
        return
    import imageio.v3 as iio

    if suffix == ".gif":
        # GIF counts time in hundredths of a second.
        duration_ms = max(10 * round(100.0 / frame_rate), 20)
        iio.imwrite(path, frames, duration=duration_ms, loop=0)
    else:
        iio.imwrite(path, frames, fps=frame_rate, codec="libx264", plugin="pyav", out_pixel_format="yuv420p")


def contact_sheet(frames: np.ndarray) -> Image.Image:
    """Frames (F, H, W, 3) uint8 at even intervals, first and last included, in rows."""
    from PIL import Image

    count = min(_SHEET_FRAMES, len(frames))
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    columns = min(_SHEET_COLUMNS, count)
    rows = -(-count // columns)
    height, width = frames.shape[1:3]
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for number, frame in enumerate(chosen):
        sheet.paste(
            Image.fromarray(frame), ((number % columns) * (width + _GAP), (number // columns) * (height + _GAP))
        )
    return sheet


def _png_text(about: dict[str, str]) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("rayltx", json.dumps(about))
    return text
