"""Do the layers and kernels of this run give on several ranks what they give on one?

The self-test proves the sharding, in float32 and with narrow heads: the kernels of a real run are others. Here the model's
own first blocks run, with its weights, widths, dtype, quantised layers and choice of attention. In half precision no two
ways of adding up agree, so what counts as equal is measured too: by how much the answer moves when each linear layer rounds
to a neighbouring number. (On CPU ranks in half precision: right kernels 0.3 to 0.4 of that, ones whose log-sum-exp is in other
units 1.1 to 1.4 in bfloat16 and 8 in float16.)
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayltx.comfy_dist.comfy_types import DiffusionModel
from rayltx.comfy_dist.model_spec import TEXT_MODULES
from rayltx.comfy_dist.self_test import Case, answer, cases_for, forward_arguments
from rayltx.comfy_dist.wire import Difference
from rayltx.devices import is_out_of_memory
from rayltx.diffusion_models.lightricks.comfyui_rows import shared
from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE, worst_error
from rayltx.sequence_parallel.group import SequenceParallelGroup

logger = logging.getLogger(__name__)

_BLOCKS = 2  # at least: the second sees what the first made of every stream
_KINDS = 4  # of blocks at most
# One for each way to call a kernel: text masks, batches, no mask and masks of self-attention; and audio in all of them.
_CASES = ("text to video", "image to video", "guide with a strength", "guide with a pixel mask")
_SHARPNESS = 4.0
_NOISE_SAMPLES = 2


def differences_by_case(
    model: DiffusionModel,
    group: SequenceParallelGroup,
    dtype: torch.dtype,
    device: torch.device,
    as_projected: bool = True,
) -> dict[str, Difference]:
    """How far the first blocks' answer on several ranks is from that on one, and how far it may be.

    model: the one with weights, wherever they are; its blocks' copies on the device are gone afterwards.
    dtype: that the model computes in. as_projected: see `shared`. Counts on rank 0. Collective.
    """
    errors: dict[str, float] = {}
    noise = [TOLERANCE]
    with torch.inference_mode():
        short = first_blocks(model, device)
        _sharpen(short)
        rows = max(group.row_groups, default=0)
        names = (*_CASES, *(f"{name}, {rows} rows" for name in _CASES[:1]))
        for case in cases_for(short, group):
            if case.name not in names:
                continue
            call = functools.partial(call_in_dtype, short, case, dtype, device)
            scope = functools.partial(shared, short, group, as_projected=as_projected)
            errors[case.name], moved = _error_and_noise(call, call(), short, scope)
            noise.append(moved)
    # One bound for all: quantised layers jump from one value to the next, in one sample and not in another.
    return {name: Difference(error, max(noise)) for name, error in errors.items()}


def difference(
    call: Callable[[], list[Tensor]],
    model: DiffusionModel,
    scope: Callable[[], Any],
    renew: Callable[[], None],
    group: SequenceParallelGroup,
) -> Difference | str:
    """How far a call of the model is within a scope from what it is outside, and how far rounding would take it.

    renew: done before each call: what the one before has left behind is taken away.
    Returns what the model said instead, if it cannot be called outside of it. Raises what it raises within, and out of memory.
    Collective: the ranks of the group agree on whether to go on.
    """
    refused = ""
    whole: list[Tensor] = []
    try:
        renew()
        whole = call()
    except Exception as error:  # whatever a patch says to inputs that it is not for
        if is_out_of_memory(error):
            raise
        logger.info("a patched model does not take inputs of its trial: %s", traceback.format_exc())
        refused = f"{type(error).__name__}: {error}"
    if _any_rank(bool(refused), group, whole[0].device if whole else torch.device("cpu")):
        return refused or "another rank refused the inputs"
    within, noise = _error_and_noise(call, whole, model, scope, renew)
    return Difference(within, max(TOLERANCE, noise))


def _error_and_noise(
    call: Callable[[], list[Tensor]],
    whole: list[Tensor],
    model: DiffusionModel,
    scope: Callable[[], Any],
    renew: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """(how far a call is within the scope from the whole answer, how far rounding takes it). The rest as in `difference`."""
    noise = 0.0
    for seed in range(_NOISE_SAMPLES):
        renew()
        with rounded_otherwise(model, seed):
            noise = max(noise, worst_error(call(), whole))
    renew()
    with scope():
        return worst_error(call(), whole), noise


def _any_rank(flag: bool, group: SequenceParallelGroup, device: torch.device) -> bool:
    if group.world is None:
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group.world)
    return bool(found.item())


def first_blocks(model: DiffusionModel, device: torch.device) -> DiffusionModel:
    """A copy with the first blocks alone, and without what only prepares text; weights on the device, uncopied if there."""
    blocks = nn.ModuleList(_representatives(list(model.transformer_blocks)))
    # What deepcopy finds here it takes in place of a copy.
    memo: dict[int, Any] = {id(getattr(model, name, None)): None for name in TEXT_MODULES}
    memo.pop(id(None), None)
    left_out = {id(parameter) for name in TEXT_MODULES for parameter in _parameters(getattr(model, name, None))}
    left_out |= {*map(id, model.transformer_blocks.parameters())} - {*map(id, blocks.parameters())}
    for parameter in model.parameters():
        if id(parameter) not in left_out:
            memo[id(parameter)] = nn.Parameter(parameter.to(device), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to(device)
    memo[id(model.transformer_blocks)] = copy.deepcopy(blocks, memo)
    return copy.deepcopy(model, memo).to(device)


def _representatives(blocks: list[nn.Module]) -> list[nn.Module]:
    """The first block of each kind, by its layers' formats: files often quantise all but the outer ones. Two at least."""
    kinds = [_kind(block) for block in blocks]
    chosen = sorted({kinds.index(kind) for kind in kinds})[:_KINDS]
    chosen += [number for number in range(len(blocks)) if number not in chosen][: max(0, _BLOCKS - len(chosen))]
    return [blocks[number] for number in sorted(chosen)]


def _kind(block: nn.Module) -> list[tuple[str, str]]:
    """What each of its parameters and layers is held in."""
    kind = [(name, f"{parameter.dtype} {type(parameter).__name__}") for name, parameter in block.named_parameters()]
    for name, layer in block.named_modules():
        kind.append((name, f"{vars(layer).get('layout_type')} {vars(layer).get('block_format')}"))
    return kind


def _parameters(module: nn.Module | None) -> Iterator[nn.Parameter]:
    return iter(()) if module is None else module.parameters()


def _sharpen(model: nn.Module) -> None:
    """Make queries longer, so that few keys count for each: next to random inputs all count alike, and parts that were merged
    with wrong weights would hardly show.
    """
    for name, module in model.named_modules():
        if name.endswith(".q_norm"):
            module.register_forward_hook(lambda module, args, out: out * _SHARPNESS)


@contextlib.contextmanager
def rounded_otherwise(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Let each linear layer's numbers round to a neighbour, up or down, within the `with`."""
    generators: dict[torch.device, torch.Generator] = {}

    def to_a_neighbour(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
        generator = generators.setdefault(out.device, torch.Generator(out.device).manual_seed(seed))
        ulps = torch.rand(out.shape, generator=generator, device=out.device) * 2 - 1
        return out * (1 + torch.finfo(out.dtype).eps * ulps).to(out)

    with contextlib.ExitStack() as scope:
        for layer in model.modules():
            if hasattr(layer, "in_features"):  # ComfyUI's quantised linear layers are no nn.Linear
                scope.callback(layer.register_forward_hook(to_a_neighbour).remove)
        yield


def call_in_dtype(
    model: DiffusionModel,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    options: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """The model's answer to a case's inputs in the dtype that ComfyUI would hand them in: all but timesteps in its own.

    options: transformer options besides the case's.
    """
    (x, timestep), kwargs = forward_arguments(model, case, device)
    kwargs["transformer_options"].update(options or {})
    return answer(
        model, (_in_dtype(x, dtype), timestep), {key: _in_dtype(value, dtype) for key, value in kwargs.items()}
    )


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return [_in_dtype(item, dtype) for item in value] if isinstance(value, list) else value
