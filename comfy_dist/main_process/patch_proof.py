"""Patches are proved before they are trusted: whether a patched model gives on several ranks what it gives on one.

A patch that treats each token by itself runs on a rank's tokens like the model. One that counts tokens, or attends by its own
means, would give another picture without a word. So the workers compare, with the patches on, before the first step. Where
that differs, all ranks share the rows that were to go to different ones; and where patches sit on modules, the modules are
shown all tokens. Each is proved again. What is left is refused.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from rayltx.comfy_dist.comfy_types import Options
from rayltx.comfy_dist.main_process.forwarding import MODEL_PREFIX, OPTION_PATCHES
from rayltx.comfy_dist.model_spec import OWN_ATTENTION, TEXT_MODULES
from rayltx.comfy_dist.self_test import Case
from rayltx.comfy_dist.wire import Difference, PatchState, Way
from rayltx.diffusion_models.lightricks.roles import AttentionRole
from rayltx.distributed_worker.messages import INLINE_BYTES, Message
from rayltx.errors import RanksDisagree, RanksFailedAlike, UnsupportedError, listed
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_FEED_FORWARD = "ff"
_MOST_TOKENS = 4096  # of a step that is tried whole on one device
_CAN_BE_SHOWN_ALL = {role.value for role in AttentionRole} | {_FEED_FORWARD}

Try = Callable[["Case | None", Way], "Difference | str"]
"""(small inputs or None for the step's own, how they are shared) -> as `ComfyHost.patch_test`."""


def names_of_patches(state: PatchState, options: Options) -> list[str]:
    """What a MODEL has besides patches of weights, for messages; [] for nothing that has to be proved."""
    names = [name for name in state.object_patches if _is_in_forward(name)]
    names += [f"injection {name}" for name in state.injections]
    names += [f"weight wrapper of {name}" for name in state.weight_wrapper_patches]
    for kind in OPTION_PATCHES:
        found = options.get(kind)
        if isinstance(found, Mapping):
            names += [f"{kind} {name}" for name, inner in found.items() if inner]
        elif found is not None:
            names.append(kind)
    return names


def _is_in_forward(object_patch: str) -> bool:
    """Whether it is on what sees video tokens: modules that prepare text do not."""
    return object_patch.startswith(MODEL_PREFIX) and object_patch.split(".")[1] not in TEXT_MODULES


def modules_to_show_all(state: PatchState) -> tuple[str, ...]:
    """The modules, by name, that object patches sit on; () if one sits where tokens cannot be gathered around it."""
    modules = set()
    for name in state.object_patches:
        if not _is_in_forward(name):
            continue
        module = name.removeprefix(MODEL_PREFIX).removesuffix(".forward").removesuffix(OWN_ATTENTION)
        if not module.startswith("transformer_blocks.") or module.rpartition(".")[2] not in _CAN_BE_SHOWN_ALL:
            return ()
        modules.add(module)
    return tuple(sorted(modules))


@dataclass(frozen=True)
class Patched:
    """What is to be proved: patches, and a kind of input, on ranks that share the work in one way."""

    names: list[str]
    state: PatchState
    digests: tuple[bytes, bytes]  # of the state's code, and of the options
    case: Case
    config: ParallelConfig
    video_tokens: int  # of the step's own inputs
    kinds: tuple[int, ...] = ()  # which conditioning each part of the batch has, which patches can look at
    rows_go_apart: bool = False  # whether these inputs' rows go to different ranks, unless the patches forbid it

    @property
    def key(self) -> Hashable:
        """The same for the same: patches by what they are made of."""
        return self.digests, self.case, self.config, self.kinds, self.rows_go_apart

    @property
    def own_inputs_are_small(self) -> bool:
        """Whether one device can do the step whole."""
        return self.video_tokens <= _MOST_TOKENS


def digest_of(message: Message) -> bytes:
    """By what it is made of, without the large tensors in it."""
    digest = hashlib.sha256(message.payload)
    for wire in message.tensors:
        digest.update(repr((wire.dtype, wire.shape)).encode())
        if isinstance(wire.data, np.ndarray) and wire.data.nbytes < INLINE_BYTES:
            digest.update(wire.data.data)
    return digest.digest()


class PatchProofs:
    """What has been proved on some workers."""

    def __init__(self) -> None:
        self._proved: dict[Hashable, Way] = {}

    def known(self, patched: Patched) -> Way | None:
        """How these patches are shared, if they have been proved."""
        return self._proved.get(patched.key)

    def prove(self, patched: Patched, attempt: Try) -> Way:
        """Returns how the patches are shared. Raises UnsupportedError, by their names, if nothing is equal."""
        started = time.monotonic()
        named = listed(patched.names)
        told: Difference | str = ""
        for way in _ways(patched):
            found = _tried(attempt, patched, way)
            if not isinstance(found, str) and found.is_rounding:
                break
            if not way.gathered:
                told = found  # by the patch as it is, with as many rows at once as it asks for
        else:
            raise UnsupportedError(_refusal(named, told, patched.config))
        if patched.rows_go_apart and not way.rows_apart:
            logger.warning(
                "%s: looks at more than one row of the batch at a time, so all ranks share each row: exact, and slower than with "
                "rows on different GPUs", named,
            )  # fmt: skip
        if way.gathered:
            logger.warning(
                "%s: looks at more than one token at a time, so %d modules run on all tokens on every rank: exact, and not "
                "faster there than on one GPU", named, len(way.gathered),
            )  # fmt: skip
        logger.info(
            "%s: exact on %d ranks (%.1e of %.1e that rounding accounts for, %.1f s)",
            named, patched.config.world_size, found.error, found.allowed, time.monotonic() - started,
        )  # fmt: skip
        self._proved[patched.key] = way
        return way


def _ways(patched: Patched) -> list[Way]:
    """How patches can be shared, the fastest first."""
    rows = (True, False) if patched.rows_go_apart else (False,)
    modules = modules_to_show_all(patched.state)
    return [Way(shown, apart) for shown in ([(), modules] if modules else [()]) for apart in rows]


def _tried(attempt: Try, patched: Patched, way: Way) -> Difference | str:
    """On small inputs, or on the step's own where a patch does not take such, and one device can do them whole."""
    try:
        found = attempt(patched.case, way)
        return attempt(None, way) if isinstance(found, str) and patched.own_inputs_are_small else found
    except (RanksDisagree, RanksFailedAlike) as error:
        return str(error).splitlines()[0]


def _refusal(named: str, found: Difference | str, config: ParallelConfig) -> str:
    if isinstance(found, str):
        difference = f"does not run there ({found})"
    else:
        difference = f"would differ by {found.error:.1e} of itself (rounding accounts for {found.allowed:.1e})"
    return (
        f"a patch looks at more than one video token at a time, and each of {config.world_size} GPUs holds a part of them: with "
        f"{named}, the model's answer {difference}. Remove the node that adds it, or set GPU and all degrees to 1 for "
        "this graph"
    )
