"""A MODEL of ours shared otherwise, for the LTX-2 memory nodes."""

from __future__ import annotations

import dataclasses

from rayltx.comfy_dist.comfy_types import Model
from rayltx.comfy_dist.main_process.feed_forward_patch import with_chunked_feed_forward
from rayltx.comfy_dist.marks import is_twin
from rayltx.errors import InputError, ParallelConfigError
from rayltx.sequence_parallel.partition import ParallelConfig


def _require_twin(model: Model) -> None:
    if not is_twin(model):
        raise InputError(
            "this MODEL is on one GPU: load it with Load Diffusion Model (Ray), whose second output is a MODEL that runs on "
            "several; for the chunked feed-forward alone, use LTX Chunked Feed-Forward"
        )


def with_ulysses(model: Model, num_gpus: int, chunks: int) -> tuple[Model, str]:
    """Share a MODEL among the first `num_gpus` workers by Ulysses. Returns a clone, and what was done.

    Raises InputError for a MODEL that is not ours, ParallelConfigError for more ranks than workers.
    """
    _require_twin(model)
    shared = _shared(model, _with_shares_of(model, ParallelConfig(ulysses_degree=num_gpus)))
    info = f"Ulysses over {num_gpus} workers"
    if chunks != 1:
        shared = with_chunked_feed_forward(shared, chunks)
        info += f"; the feed-forward runs in up to {chunks} parts"
    return shared, info


def with_ring(model: Model, num_gpus: int) -> tuple[Model, str]:
    """Share a MODEL by ring attention among `num_gpus` GPUs without the first one. Returns a clone, and what was done.

    On the CPU there is no first GPU to leave out, and all `num_gpus` workers take part. Raises as `with_ulysses`.
    """
    _require_twin(model)
    request = model.placement.request
    if request.on_cpu or num_gpus == 1:
        shared = _shared(model, _with_shares_of(model, ParallelConfig(ring_degree=num_gpus)))
        return shared, f"ring attention over {num_gpus} workers"
    visible = request.kind.count()
    if num_gpus > visible:
        raise ParallelConfigError(f"num_gpus={num_gpus}, but {visible} are visible to ComfyUI; lower it")
    indices = tuple(range(1, num_gpus))
    request = dataclasses.replace(request, workers=len(indices), gpu_indices=indices)
    placement = dataclasses.replace(model.placement, request=request, config=ParallelConfig(ring_degree=len(indices)))
    chosen = ", ".join(map(str, indices))
    return model.placed(placement), f"ring attention over GPU {chosen}; GPU 0 is left to the text encoder and the VAE"


def _with_shares_of(model: Model, config: ParallelConfig) -> ParallelConfig:
    """With the shares that were given by hand, if they are for as many GPUs."""
    shares = model.placement.config.shares
    return dataclasses.replace(config, shares=shares) if len(shares) == config.world_size else config


def _shared(model: Model, config: ParallelConfig) -> Model:
    try:
        return model.with_config(config)
    except ParallelConfigError as error:
        raise ParallelConfigError(
            f"num_gpus={config.world_size}: {error}; Ray Init Actor starts them, by its GPU and degrees"
        ) from error
