"""Whether patches of weights fit the weights: ComfyUI logs an error for one that does not, and samples without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rayltx.comfy_dist.comfy_types import KeyPatches

Shape = tuple[int, int]


def misfits(patches: KeyPatches, weights: Mapping[str, Tensor], prefix: str) -> list[str]:
    """A line for each patched weight whose patch is of another shape, saying both.

    patches: as a ModelPatcher holds them, by name with `prefix`. weights: by name without; shapes are looked at alone.
    Kinds of patches whose shape cannot be told are taken to fit.
    """
    found = []
    for key, entries in patches.items():
        weight = weights.get(key.removeprefix(prefix))
        if weight is None or weight.ndim != 2:
            continue
        for _, patch, _, offset, *_ in entries:
            wanted = list(weight.shape)
            if offset is not None:
                wanted[offset[0]] = offset[2]
            made = _shape_of(patch)
            if made is not None and list(made) != wanted:
                found.append(f"{key} is made for {made[0]}x{made[1]}, and the model has {wanted[0]}x{wanted[1]}")
    return found


def _shape_of(patch: object) -> Shape | None:
    """Of the difference that a patch makes. ComfyUI's adapters keep their tensors in a tuple, a kind its own order."""
    kind = getattr(patch, "name", None)
    factors: Any = getattr(patch, "weights", None)
    if kind == "lora" and factors[3] is None and factors[5] is None:  # neither of a convolution, nor one that resizes
        return _product(factors[0], factors[1])
    if kind == "loha" and factors[5] is None:
        return _product(factors[0], factors[1])
    if kind == "lokr" and factors[7] is None:
        small = factors[0].shape[:2] if factors[0] is not None else _product(factors[3], factors[4])
        large = factors[1].shape[:2] if factors[1] is not None else _product(factors[5], factors[6])
        return small[0] * large[0], small[1] * large[1]
    if isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "diff" and len(patch[1]) == 1:
        difference = patch[1][0]
        return (difference.shape[0], difference[0].numel()) if difference.ndim > 1 else None
    return None


def _product(up: Tensor, down: Tensor) -> Shape:
    return up.shape[0], down.flatten(1).shape[1]
