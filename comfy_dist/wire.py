"""What crosses between ComfyUI's process and a worker.

Each field says who reads it. Tensors may be anywhere in them; they arrive on the CPU. Nothing here knows ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rayltx.comfy_dist.comfy_types import KeyPatches, Options
from rayltx.comfy_dist.self_test import Case
from rayltx.distributed_worker.messages import Message


@dataclass(frozen=True)
class LoadInputs:
    """By what a worker puts weights on its device before it computes, if they are not there. Read by `ComfyModel` alone."""

    run: int  # the number of the sampling run: in another, something else may have taken the weights' place
    latent_shape: list[int]  # of what is sampled, by which ComfyUI estimates memory
    weight_budget: int  # bytes of weights on the device at most, the rest is streamed; 0: as many as fit
    share: float  # of the estimate, that a rank holds
    sharing_bytes: int = 0  # what a rank needs besides its share of it


@dataclass(frozen=True)
class Way:
    """How a model with patches is shared, exactly. Read by the seam."""

    gathered: tuple[str, ...] = ()  # modules that are shown all tokens
    rows_apart: bool = True  # whether rows of a batch go to different ranks, where the degrees say so


@dataclass(frozen=True)
class StepInputs:
    """One call of the model."""

    arguments: dict[str, object]  # read by the model: of its `_forward`, by name, without `transformer_options`
    changing_options: Options  # read by the model and its patches: the transformer options that change with every step
    options_key: str  # read by `ComfyModel`: which of the options that it keeps go with them
    hooks_key: str | None  # read by `ComfyModel`: which of the hooks that it keeps are on; None: none
    load: LoadInputs
    way: Way = Way()
    saves_memory: bool = False  # read by `ComfyModel`: a device's memory ran out
    by_fewer: bool = False  # read by `ComfyModel`: a step of fewer ranks than all, without room to keep text


@dataclass(frozen=True)
class PatchTestInputs:
    """What patches are tried on: the options of a step, and small inputs of the step's kind, or the step's own."""

    step: StepInputs
    case: Case | None  # None: the step's own


@dataclass(frozen=True)
class TextInputs:
    """One call of the text connector, `preprocess_text_embeds` of the model, which reads both."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    load: LoadInputs
    attention: Callable[..., Any] | None  # read by `ComfyModel`: what is in the place of ComfyUI's choice of attention


@dataclass(frozen=True)
class ModuleInputs(TextInputs):
    """One call of a module that prepares text, which reads both."""

    name: str  # read by `ComfyModel`: within the model


@dataclass(frozen=True)
class ConstantOptions:
    """Transformer options that stay the same over many steps: patches and the like, whose state lives on between them."""

    key: str  # read by `ComfyModel`
    options: (
        Message  # of the options, which the model and its patches read; unpacked anew for each trial of the patches
    )


@dataclass(frozen=True)
class HookPatches:
    """The weight patches of some hooks, combined with their strengths of the moment."""

    key: str  # read by `ComfyModel`
    patches: KeyPatches  # read by the worker's patcher


@dataclass(frozen=True)
class PatchState:
    """The patches of one MODEL: what makes its weights and modules others than the file's.

    Read by the worker's patcher, which takes them for its own; each has the name that ComfyUI's patcher gives it.
    """

    patches_uuid: object = None  # another for other patches of weights
    patches: KeyPatches = field(default_factory=dict)  # of weights: LoRA and its kin
    object_patches: dict[str, object] = field(default_factory=dict)
    weight_wrapper_patches: dict[str, list[object]] = field(default_factory=dict)
    injections: dict[str, list[object]] = field(default_factory=dict)
    force_cast_weights: bool = False


@dataclass(frozen=True)
class Difference:
    """Relative errors: of an answer on several ranks against that on one, and the largest that rounding accounts for."""

    error: float
    allowed: float

    @property
    def is_rounding(self) -> bool:
        return self.error <= self.allowed

    @property
    def may_be_rounding(self) -> bool:
        """Other devices add up otherwise: twice as much is no proof of anything wrong."""
        return self.error <= 2 * self.allowed


@dataclass(frozen=True)
class SentPatches:
    """The patches of one MODEL as they cross: those that may keep something between calls apart."""

    state: PatchState  # without `OBJECTS`
    objects: Message  # of a dictionary of them, unpacked anew for each trial of the patches


OBJECTS = ("object_patches", "injections")
"""The fields of a PatchState that hold code."""
