"""The decoders of ComfyUI's LTX video VAEs on several ranks, each with a slab of the picture.

A slab is some columns of the latent, or rows where it has more of these, through all frames. Everything that a decoder does
looks at one place alone, but for two kinds of layers, which are shown their neighbours' borders:

- convolutions (LTX-Video to 2.3), which see one place around them;
- neighbourhood attention (the diffusion decoder of 2.5), which sees a window of fixed size around each query, shifted inward
  at the edges of the picture, and whose positions are the picture's.

Noise is drawn for the whole picture on every rank, and cut. The answer is that of one rank but for the order of sums; no tile
is blended with another. Nothing of ComfyUI's code is written again: its functions are wrapped while a slab is decoded.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rayltx.diffusion_models.lightricks.replaced import replaced
from rayltx.sequence_parallel.borders import with_borders
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import Partition

_CONVOLUTION, _ATTENTION = (
    "CausalConv3d",
    "NeighborhoodAttention3D",
)  # ComfyUI's classes of layers that see more than one place
_OVER_THE_PICTURE = (nn.GroupNorm, nn.BatchNorm3d, nn.InstanceNorm3d)
_CHUNK_BYTES = (
    2**20
)  # to a multiple of which the size of a chunk is rounded down, so that all ranks make as many chunks


@dataclass(frozen=True)
class Slabs:
    """Who decodes what of a latent (B, C, T, H, W)."""

    dim: int  # along which it is cut, counted from the end: -1 for columns, -2 for rows
    parts: Partition  # in latents

    @classmethod
    def of(cls, model: Any, shape: Sequence[int], group: SequenceParallelGroup) -> Slabs | str:
        """The slabs of a latent of this shape, or why there are none: it cannot be decoded so, exactly."""
        if group.world_size == 1:
            return "there is one rank"
        if len(shape) != 5:
            return f"a latent of {len(shape)} dimensions is no video"
        decoder = model.decoder
        strange = {type(layer).__name__ for layer in decoder.modules() if isinstance(layer, _OVER_THE_PICTURE)}
        if strange:
            return f"{', '.join(sorted(strange))} sums over the whole picture"
        kinds = {type(layer).__name__ for layer in decoder.modules()}
        if not kinds & {_CONVOLUTION, _ATTENTION}:
            return f"{type(decoder).__name__} has no layers that are known"
        plain = [name for name, layer in decoder.named_modules() if _is_plain_convolution(name, layer, decoder)]
        if plain:
            return f"{plain[0]} is a convolution of another kind"
        if any(layer.conv.stride[1:] != (1, 1) for layer in decoder.modules() if type(layer).__name__ == _CONVOLUTION):
            return "a convolution of the decoder leaves out places"
        dim = -1 if shape[-1] >= shape[-2] else -2
        parts = group.config.token_sizes(shape[dim])
        at_edge, within = _least(decoder, dim)
        needed = [at_edge if part in (0, group.world_size - 1) else within for part in range(group.world_size)]
        if any(size < least for size, least in zip(parts.sizes, needed)):
            return (
                f"{shape[dim]} latents give {group.world_size} ranks fewer than the {max(needed)} that a window needs"
            )
        return cls(dim, parts)


def _is_plain_convolution(name: str, layer: nn.Module, decoder: nn.Module) -> bool:
    """Whether it sees more than one place, and is not a part of a layer that is known."""
    if not isinstance(layer, nn.modules.conv._ConvNd) or set(layer.kernel_size) == {1}:  # noqa: SLF001  # torch's common class
        return False
    return type(decoder.get_submodule(name.rpartition(".")[0])).__name__ != _CONVOLUTION


def _least(decoder: Any, dim: int) -> tuple[int, int]:
    """How many latents a slab at the picture's edge has to have, and one within.

    A window at the edge is shifted inward, by half of it at most, and has to find all of itself in what its rank is shown. In
    later stages a slab has more places, and windows are not as much larger.
    """
    at_edge, within = 1, 1
    for stage, scale in _stages_of(decoder, dim):
        for layer in stage.modules():
            if type(layer).__name__ == _ATTENTION:
                window = layer.kernel_size[dim]
                at_edge = max(at_edge, -(-(window - window // 2) // scale))
                within = max(within, -(-(window // 2) // scale))
    return at_edge, within


def _stages_of(decoder: Any, dim: int) -> Iterator[tuple[Any, int]]:
    """The parts of a decoder with attention, and how many places a latent has there."""
    scale = 1
    for stage, upsample in zip(getattr(decoder, "det_stages", ()), getattr(decoder, "upsamples", ())):
        yield stage, scale
        scale *= upsample.stride[dim]
    if hasattr(decoder, "diff_blocks"):
        yield decoder.diff_blocks, scale


def decode_slab(
    model: Any, latent: Tensor, slabs: Slabs, group: SequenceParallelGroup, options: Mapping[str, Any] = {}
) -> Tensor:
    """This rank's part of the decoded video.

    model: ComfyUI's VAE model, on the latent's device. latent: (B, C, T, H, W), whole. options: for the model's `decode`.
    Returns (B, channels, frames, height, width) of what `slabs` gives this rank. The device's random state, which has to be alike
    on all ranks, is afterwards what it is after the model decodes alone. Raises what the model raises. Collective.
    """
    cut = _Cut(slabs, group)
    local = latent.narrow(slabs.dim, slabs.parts.starts[group.rank], slabs.parts.sizes[group.rank])
    with cut.layers_of(model), _WholeNoise(cut):
        return model.decode(local, **options)


class _Cut:
    """What the wrapped functions know of the slab that is decoded."""

    def __init__(self, slabs: Slabs, group: SequenceParallelGroup) -> None:
        self.dim, self._parts, self._group = slabs.dim, slabs.parts, group
        self._held = slabs.parts.sizes[group.rank]
        self._shown = 0, 0  # places of neighbours' before and behind, in the attention that runs

    def whole(self, places: int) -> int:
        """How many places the whole picture has where this rank has so many."""
        return places * self._parts.total // self._held

    def start(self, places: int) -> int:
        """Where this rank's begin."""
        return places * self._parts.starts[self._group.rank] // self._held

    @contextlib.contextmanager
    def layers_of(self, model: Any) -> Iterator[None]:
        """Have the layers that see more than one place see their neighbours', within the `with`."""
        module = module_of(model.decoder)
        with contextlib.ExitStack() as scope:
            for layer in model.decoder.modules():
                if type(layer).__name__ == _CONVOLUTION:
                    forward = functools.partial(self._convolve, layer.forward, layer.conv.kernel_size[self.dim] // 2)
                    scope.enter_context(replaced(layer, "forward", forward))
                elif type(layer).__name__ == _ATTENTION:
                    forward = functools.partial(self._attend, layer.forward, layer.kernel_size[self.dim] // 2)
                    scope.enter_context(replaced(layer, "forward", forward))
            if hasattr(module, "get_max_chunk_size"):
                largest = functools.partial(self._chunk_bytes, module.get_max_chunk_size)
                scope.enter_context(replaced(module, "get_max_chunk_size", largest))
            if hasattr(module, "_rope_tables"):
                positions = functools.partial(self._positions, getattr(module, "_rope_tables"))  # noqa: B009  # ComfyUI's own name
                scope.enter_context(replaced(module, "_rope_tables", positions))
            yield

    def _convolve(self, forward: Callable[..., Tensor], width: int, x: Tensor, causal: bool = True) -> Tensor:
        self._group.at_block()
        joined, before = with_borders(x, self.dim, width, self._group)
        return forward(joined, causal=causal).narrow(self.dim, before, x.shape[self.dim])

    def _attend(
        self,
        forward: Callable[..., Tensor],
        width: int,
        x: Tensor,
        pre: Callable[[Tensor], Tensor] | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, H, W, channels). Neighbours' places attend as well, to what is here of their windows, and are cut off."""
        self._group.at_block()
        dim, held = self.dim - 1, x.shape[self.dim - 1]
        joined, before = with_borders(x, dim, width, self._group)
        self._shown = before, joined.shape[dim] - held - before
        out = forward(joined, pre=pre).narrow(dim, before, held)
        return out if add_to is None else add_to.add_(out)

    def _positions(
        self, tables: Callable[..., list[tuple[Tensor, Tensor]]], lengths: Sequence[int], *args: Any
    ) -> list[tuple[Tensor, Tensor]]:
        before, behind = self._shown
        places = lengths[self.dim] - before - behind
        whole = list(lengths)
        whole[self.dim] = self.whole(places)
        found = list(tables(tuple(whole), *args))
        here = slice(self.start(places) - before, self.start(places) + places + behind)
        found[self.dim] = tuple(table[here] for table in found[self.dim])  # type: ignore[assignment]
        return found

    def _chunk_bytes(self, largest: Callable[..., int], device: Any = None, **kwargs: Any) -> _ShareOfChunk:
        """What ComfyUI takes of the whole picture through the decoder at once, on the rank that has least memory."""
        own = torch.tensor(largest(device, **kwargs), dtype=torch.int64, device=device)
        dist.all_reduce(own, dist.ReduceOp.MIN, self._group.world)
        return _ShareOfChunk(int(own), self)


class _ShareOfChunk:
    """In the place of a chunk's bytes. Each rank makes as many chunks of its frames as one would of the whole picture's.

    So the ranks meet, and what a rank holds falls with their number. ComfyUI asks `(bytes + this - 1) // this`.
    """

    def __init__(self, chunk_bytes: int, cut: _Cut) -> None:
        self._bytes, self._cut = chunk_bytes, cut

    def __radd__(self, local_bytes: int) -> _Chunks:
        return _Chunks(-(-self._cut.whole(local_bytes) // self._bytes))


@dataclass(frozen=True)
class _Chunks:
    count: int

    def __sub__(self, one: int) -> _Chunks:
        return self

    def __floordiv__(self, chunk: _ShareOfChunk) -> int:
        return self.count


@contextlib.contextmanager
def chunks_of(model: Any, chunk_bytes: int | None) -> Iterator[None]:
    """Within the `with`, a video goes through the model's decoder in chunks of so many bytes. None: by this device's memory."""
    module = None if chunk_bytes is None else module_of(model.decoder)
    if not hasattr(module, "get_max_chunk_size"):
        yield
        return
    with replaced(module, "get_max_chunk_size", lambda device=None, **kwargs: chunk_bytes):
        yield


def module_of(decoder: object) -> Any:
    """The module of ComfyUI's in which a decoder's class stands."""
    return sys.modules[type(decoder).__module__]


class _WholeNoise(TorchFunctionMode):
    """Has noise drawn for the whole picture, and cut."""

    def __init__(self, cut: _Cut) -> None:
        super().__init__()
        self._cut = cut

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.randn_like:
            like = args[0]
            return self._cut_of(torch.randn, list(like.shape), {"dtype": like.dtype, "device": like.device, **kwargs})
        if func is torch.randn:
            shape = list(args[0]) if len(args) == 1 and not isinstance(args[0], int) else list(args)
            return self._cut_of(torch.randn, shape, kwargs)
        return func(*args, **kwargs)

    def _cut_of(self, draw: Callable[..., Tensor], shape: list[int], kwargs: Mapping[str, Any]) -> Tensor:
        dim, places = self._cut.dim, shape[self._cut.dim]
        whole = [*shape]
        whole[dim] = self._cut.whole(places)
        # A copy, so that the whole does not stay for the part.
        return draw(whole, **kwargs).narrow(dim, self._cut.start(places), places).clone()
