"""What a worker's VAE can be asked from ComfyUI's process.

`worker_process.comfy_vae.ComfyVAE` answers. The marks are those of `distributed_worker.worker_calls`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rayltx.comfy_dist.auxiliary_host import AuxiliaryHost
from rayltx.distributed_worker.worker_calls import collective, individual
from rayltx.sequence_parallel.group import SequenceParallelGroup

VAE_HOST = "rayltx.comfy_dist.worker_process.comfy_vae:ComfyVAE"  # what a worker imports


@dataclass(frozen=True)
class VAESpec:
    """How a worker builds ComfyUI's VAE. Picklable."""

    metadata: Mapping[str, str]
    dtype: torch.dtype  # that it computes in, as ComfyUI's process chose


@dataclass(frozen=True)
class VAECall:
    """One call of the VAE's model."""

    x: Tensor  # what the model is given
    settings: Mapping[str, object] = field(default_factory=dict)  # attributes of the model that nodes set
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments
    random_state: Tensor | None = None  # of the device's generator, before the call; None: nothing is drawn from it
    # That go through the decoder at once: with each chunk some decoders draw noise. None: by the worker's own memory.
    chunk_bytes: int | None = None


@dataclass(frozen=True)
class Slab:
    """A part of a decoded video."""

    dim: int
    start: int
    pixels: Tensor


class VAEHost(AuxiliaryHost, Protocol):
    """ComfyUI's VAE on one worker."""

    @collective
    def forward(self, group: SequenceParallelGroup, inputs: VAECall) -> tuple[Slab, Tensor | None]:
        """Decode a video together. Returns this rank's part, on the CPU, and the random state afterwards.

        Raises InputError, alike on every rank, for a latent that cannot be cut.
        """
        ...

    @collective
    def slab_test(self, group: SequenceParallelGroup, inputs: VAECall) -> tuple[float, float]:
        """Decode a small video together and alone. Returns how far apart these are, and how far they may be; rank 0's count."""
        ...

    @individual
    def decode(self, call: VAECall) -> Tensor:
        """Decode a video, a tile of one, or sound. Returns it on the CPU. Raises what the model raises."""
        ...

    @individual
    def encode(self, call: VAECall) -> Tensor:
        """The reverse."""
        ...

    @individual
    def draws(self, call: VAECall) -> list[tuple[int, ...]]:
        """The shapes of the noise that decoding this would draw from the device's generator, in their order."""
        ...
