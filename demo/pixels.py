"""What the demo's latents are: a fixed linear map between pixels and LTX-shaped latents, which its VAE was taught.

LTX's latents hold 128 numbers for every block of 8 pixel frames x 32 x 32 pixels, and for the first pixel frame alone.
Here those numbers are the 128 lowest frequencies of the block's orthonormal 3-D cosine transform (DCT-II) in a
luma/chroma basis. Any latent is decoded and encoded back unchanged, up to rounding; a clip comes back as its
low frequencies, which is a blurred clip.

Letters in shapes: F pixel frames, H, W pixel height and width, f, h, w the same in latents, C = 128 channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rayltx.demo.clips import BACKGROUND

NUM_CHANNELS = 128
_KEPT = 8  # frequencies of 32 in a row and a column, of which 128 in all are kept

# JFIF's luma/chroma basis (ITU-T T.871).
_YCC_FROM_RGB = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def _cosine_basis(size: int) -> Tensor:
    """(size, size) orthonormal DCT-II, one frequency a row."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    position = torch.arange(size, dtype=torch.float64)[None, :] + 0.5
    basis = torch.cos(math.pi * position * frequency / size) * math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis.float()


def _channels() -> list[tuple[float, int, int, int, int]]:
    """The 128 (cost, component, kt, ky, kx) kept, cheapest first.

    Temporal and chroma frequencies cost more, because they carry less of a moving shape's energy: on the clips of
    `rayltx.demo.clips` this choice keeps 98.9 % of it, and the best possible 128 keep 99.1 %.
    """
    candidates = [
        (math.hypot(ky, kx) + 1.5 * kt + (2.0 if component else 0.0), component, kt, ky, kx)
        for component in range(3)
        for kt in range(8)
        for ky in range(_KEPT)
        for kx in range(_KEPT)
    ]
    return sorted(candidates)[:NUM_CHANNELS]


_CHANNELS = _channels()
_INDEX = torch.tensor([((c * 8 + kt) * _KEPT + ky) * _KEPT + kx for _, c, kt, ky, kx in _CHANNELS])


def _spread(cost: float, component: int) -> float:
    """How much a coefficient varies where there is a shape: a fit on the same clips.

    Dividing by it brings every channel near unit variance, as LTX's own latents are. A block's mean colour stands out.
    """
    if cost == (2.0 if component else 0.0):
        return 22.0 if component else 50.0
    return math.exp(2.95 - 0.55 * cost)


SPREAD = torch.tensor([_spread(cost, component) for cost, component, *_ in _CHANNELS])
_OFFSET = (2.0 * torch.tensor(BACKGROUND) - 1.0) @ _YCC_FROM_RGB.T  # the background is the zero of every latent
_DCT8, _DCT32 = _cosine_basis(8), _cosine_basis(32)[:_KEPT]


def pixels_to_latent(clip: Tensor) -> Tensor:
    """Encode a clip.

    clip: (F, H, W, 3) float in [0, 1], F = 8k + 1, H and W multiples of 32.
    Returns (C, f, h, w) float32, f = k + 1, h = H/32, w = W/32.
    Raises ValueError for other sizes.
    """
    pixel_frames, height, width, _ = clip.shape
    if (pixel_frames - 1) % 8 or height % 32 or width % 32:
        raise ValueError(
            f"a clip of {pixel_frames} frames of {width}x{height} cannot be encoded: frames must be 8k + 1, "
            "width and height multiples of 32"
        )
    latent_frames, rows, columns = (pixel_frames - 1) // 8 + 1, height // 32, width // 32
    components = (2.0 * clip.float() - 1.0) @ _YCC_FROM_RGB.T - _OFFSET
    components = torch.cat([components[:1].expand(8, -1, -1, -1), components[1:]])  # the first latent is one frame
    blocks = components.view(latent_frames, 8, rows, 32, columns, 32, 3)
    in_rows = torch.einsum("ftyaxbc,kb->ftyaxck", blocks, _DCT32)
    in_both = torch.einsum("ftyaxck,ja->ftyxcjk", in_rows, _DCT32)
    spectrum = torch.einsum("ftyxcjk,it->fyxcijk", in_both, _DCT8)
    latent = spectrum.reshape(latent_frames, rows, columns, -1)[..., _INDEX] / SPREAD
    return latent.permute(3, 0, 1, 2).contiguous()


def latent_to_pixels(latent: Tensor) -> Tensor:
    """Decode a latent (C, f, h, w), any float dtype, to a clip (8 (f-1) + 1, 32 h, 32 w, 3) float32 in [0, 1]."""
    _, latent_frames, rows, columns = latent.shape
    coefficients = latent.float().permute(1, 2, 3, 0) * SPREAD
    spectrum = torch.zeros(latent_frames, rows, columns, 3 * 8 * _KEPT**2)
    spectrum[..., _INDEX] = coefficients
    spectrum = spectrum.view(latent_frames, rows, columns, 3, 8, _KEPT, _KEPT)
    blocks = torch.einsum("fyxcijk,it,ja,kb->ftyaxbc", spectrum, _DCT8, _DCT32, _DCT32)
    components = blocks.reshape(latent_frames * 8, rows * 32, columns * 32, 3)
    # The first latent stands for one pixel frame: the mean of its eight, which is what its still part says.
    components = torch.cat([components[:8].mean(0, keepdim=True), components[8:]])
    rgb = (components + _OFFSET) @ torch.linalg.inv(_YCC_FROM_RGB).T
    return ((rgb + 1.0) / 2.0).clamp(0.0, 1.0)
