"""Weights for tiny models that are compared with themselves."""

from __future__ import annotations

import math

import torch
from torch import nn


def randomise(model: nn.Module, seed: int) -> None:
    """Give a model weights under which every part of it matters: unit gain in matrices, no zeros in gates, biases and tables."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and "table" not in name:
            noise /= math.sqrt(parameter.shape[-1])
        elif "norm" in name:
            noise = 1.0 + 0.1 * noise
        else:
            noise *= 0.2
        parameter.data = noise.to(parameter)
