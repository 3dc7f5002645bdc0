"""How far an answer is from the one that it should be, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Of one forward in float32: several ranks add up the same numbers in another order, which shows in the last bits alone.
# A rank that misses what another holds is wrong by more than 1e-2.
TOLERANCE = 2e-6


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||, in float64; infinite for another shape."""
    if out.shape != reference.shape:
        return math.inf
    reference = reference.to(torch.float64)
    return ((out.to(torch.float64) - reference).norm() / reference.norm()).item()


def worst_error(outs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest error of several streams; infinite where one is not a number, which `max` may pass over."""
    errors = [relative_error(out, reference) for out, reference in zip(outs, references, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)
