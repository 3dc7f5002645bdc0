"""Write what was generated: .mp4, .gif, a .png contact sheet, or the latent as .safetensors."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from fractions import Fraction
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

    from rayltx.cli.generated import Generated, Sound

logger = logging.getLogger(__name__)

LATENT_SUFFIX = ".safetensors"
VIDEO_SUFFIX = ".mp4"
PIXEL_SUFFIXES = (VIDEO_SUFFIX, ".gif", ".png")
_SOUND_RATE = 48000  # a second: one that AAC and every player take
_MOST_DENOMINATOR = 65535  # of a frame rate, in an mp4
_MODULES = {".mp4": ("av",), ".gif": ("imageio", "PIL"), ".png": ("PIL",)}  # that write such a file
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
        if not _is_latent(path) and not has_pixels:
            raise InputError(
                f"output {path}: this checkpoint's latents become pixels through its VAE, which ComfyUI's code runs: say where "
                "that is (--comfyui FOLDER), and which file holds the VAE if it is not the checkpoint (--vae FILE); or write a "
                ".safetensors latent"
            )
        require_packages(_MODULES.get(path.suffix.lower(), ()), f"output {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise InputError(f"output {path}: cannot be written there ({error.strerror})") from error


def _is_latent(path: Path) -> bool:
    return path.suffix.lower() == LATENT_SUFFIX


class Outputs:
    """The files that are asked for. The latent's are written as soon as it is there: what follows can fail."""

    def __init__(self, paths: list[Path], frame_rate: float, about: dict[str, str]) -> None:
        self._paths, self._frame_rate, self._about = paths, frame_rate, about

    def write_latents(self, made: Generated) -> None:
        for path in self._paths:
            if _is_latent(path):
                write_output(path, made, self._frame_rate, self._about)

    @contextlib.contextmanager
    def saving_latents(self, made: Generated) -> Iterator[None]:
        """What goes wrong within the `with` leaves the latent in a file, and says which."""
        try:
            yield
        except Exception:
            if not any(map(_is_latent, self._paths)):
                path = self._paths[0].with_suffix(LATENT_SUFFIX)
                write_output(path, made, self._frame_rate, self._about)
                logger.warning("what was sampled is in %s", path)
            raise

    def write(self, made: Generated) -> None:
        """Those of pixels. Prints the names of all."""
        with self.saving_latents(made):
            for path in self._paths:
                if not _is_latent(path):
                    write_output(path, made, self._frame_rate, self._about)
                print(path)


def write_output(path: Path, made: Generated, frame_rate: float, about: dict[str, str]) -> None:
    """Write one file, whole or not at all. Sound goes into a video alone."""
    about = {**about, "sigmas": ",".join(f"{sigma:.6g}" for sigma in made.sigmas.tolist())}
    with appearing_whole(path, path.suffix) as temporary:
        if _is_latent(path):
            save_file({name: latent.contiguous() for name, latent in made.latents.items()}, temporary, about)
        else:
            assert made.clip is not None
            _write_pixels(temporary, made.clip, made.sound, frame_rate, about)


def _write_pixels(path: Path, clip: Tensor, sound: Sound | None, frame_rate: float, about: dict[str, str]) -> None:
    suffix = path.suffix.lower()
    if suffix == ".png":
        contact_sheet(clip).save(path, pnginfo=_png_text(about))
    elif suffix == ".gif":
        import imageio.v3 as iio

        # GIF counts time in hundredths of a second.
        duration_ms = max(10 * round(100.0 / frame_rate), 20)
        iio.imwrite(path, [_as_bytes(frame) for frame in clip], duration=duration_ms, loop=0)
    else:
        _write_video(path, clip, sound, frame_rate)


def _as_bytes(frame: Tensor) -> np.ndarray:
    """(H, W, 3) in [0, 1] as uint8. Frame by frame: a long video's floats are many."""
    return (frame * 255.0).round().to(torch.uint8).numpy()


def _write_video(path: Path, clip: Tensor, sound: Sound | None, frame_rate: float) -> None:
    import av

    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(_MOST_DENOMINATOR))
        video.height, video.width = clip.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = None
        if sound is not None and sound.waveform.shape[-1]:
            audio = container.add_stream("aac", rate=_SOUND_RATE, layout=_layout(sound))
        for frame in clip:
            container.mux(video.encode(av.VideoFrame.from_ndarray(_as_bytes(frame), format="rgb24")))
        container.mux(video.encode())
        if audio is not None and sound is not None:
            resampler = av.AudioResampler(format="fltp", layout=_layout(sound), rate=_SOUND_RATE)
            samples = av.AudioFrame.from_ndarray(_channels(sound), format="fltp", layout=_layout(sound))
            samples.sample_rate = sound.sample_rate
            for part in (*resampler.resample(samples), *resampler.resample(None)):
                container.mux(audio.encode(part))
            container.mux(audio.encode())


def _layout(sound: Sound) -> str:
    return "stereo" if len(sound.waveform) == 2 else "mono"


def _channels(sound: Sound) -> np.ndarray:
    """One or two, float32; more are mixed into one."""
    waveform = sound.waveform.float()
    if len(waveform) > 2:
        waveform = waveform.mean(0, keepdim=True)
    return np.ascontiguousarray(waveform.numpy())


def contact_sheet(clip: Tensor) -> Image.Image:
    """Frames of a clip (F, H, W, 3) in [0, 1] at even intervals, first and last included, in rows."""
    from PIL import Image

    count = min(_SHEET_FRAMES, len(clip))
    chosen = [_as_bytes(clip[number]) for number in np.linspace(0, len(clip) - 1, count).round().astype(int)]
    columns = min(_SHEET_COLUMNS, count)
    rows = -(-count // columns)
    height, width = clip.shape[1:3]
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
