"""The way from a VAE of this process to the workers': its calls, whole or by tiles."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import comfy.utils
import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_types import VAE, VAEModel
from rayltx.comfy_dist.main_process.auxiliary_link import AuxiliaryLink, as_comfyui_says_it
from rayltx.comfy_dist.main_process.worker_link import raise_if_cancelled
from rayltx.comfy_dist.random_states import random_state, set_random_state
from rayltx.comfy_dist.vae_host import Slab, VAECall, VAEHost
from rayltx.diffusion_models.lightricks.comfyui_decoder import Slabs, module_of
from rayltx.diffusion_models.lightricks.replaced import replaced
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.remote_model import RemoteModel
from rayltx.distributed_worker.worker_calls import Call, ask, ask_together
from rayltx.errors import RANK_LOST, ClusterError, OutOfMemory, UnsupportedError, first_line
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_SETTING = (int, float, str)  # of what type an attribute of the model is that a node can set


@dataclass
class _Asked(Exception):
    """What the model was called with, in place of an answer."""

    call: Call[VAEHost, Tensor]


class VAELink(AuxiliaryLink):
    """Of one VAE."""

    kind = "VAE"

    def __init__(self, cluster: Cluster, remote: RemoteModel, vae: VAE) -> None:
        super().__init__(cluster, remote)
        self._device, self._dtype, self._channels = vae.device, vae.vae_dtype, vae.latent_channels
        self._made_of = _modules_of(vae.first_stage_model)
        self._is_noisy = _draws_noise(vae.first_stage_model)
        self._chunk_bytes = _chunk_bytes_on(vae.device, vae.first_stage_model) if self._is_noisy else None
        self._asking = False  # whether the model's calls are asked for, not answered
        self._tile: Tensor | None = None  # the next answer
        self._proved: dict[ParallelConfig, bool] = {}
        self._draws: dict[tuple[object, ...], list[tuple[int, ...]]] = {}
        self._told: set[str] = set()

    @property
    def _config(self) -> ParallelConfig:
        """How the workers form a group now: another would have to be formed for each change between sampling and decoding.

        All of them, where none is formed, or one of a single rank, as after a sampling to compare with.
        """
        config = self.cluster.group.config
        if config is None or config.world_size == 1:
            return ParallelConfig.for_workers(self.cluster.request.workers)
        return config

    def _loaded_again(self) -> None:
        self._proved.clear()

    # ---- calls of the model

    def decode(self, model: VAEModel, x: Tensor, output_buffer: Tensor | None, options: Mapping[str, Any]) -> Tensor:
        """`model.decode(x, **options)`. output_buffer: where it goes, if it is not None. Raises what the model raises."""
        if self._tile is not None:
            out, self._tile = self._tile, None
        elif self._asking:
            raise _Asked(ask(VAEHost.decode, self._call(model, x, options, draws=True)))
        else:
            self.ensure_loaded()
            with as_comfyui_says_it("decoding"):
                out = self._whole(model, x, output_buffer, options)
            self._rest()
        if output_buffer is None or out is output_buffer:
            return out
        return output_buffer.copy_(out)

    def encode(self, model: VAEModel, x: Tensor, options: Mapping[str, Any]) -> Tensor:
        """`model.encode(x, **options)`."""
        if self._tile is not None:
            out, self._tile = self._tile, None
            return out
        asked = ask(VAEHost.encode, self._call(model, x, options))
        if self._asking:
            raise _Asked(asked)
        self.ensure_loaded()
        with as_comfyui_says_it("encoding"):
            found = self._on_one(asked, "encoding")
        self._rest()
        return found

    def _call(self, model: VAEModel, x: Tensor, options: Mapping[str, Any], draws: bool = False) -> VAECall:
        if _modules_of(model) != self._made_of:
            raise UnsupportedError(
                "a node has changed the modules of this VAE, which are with the Ray workers: it would have no effect; use "
                "ComfyUI's own Load VAE for this graph"
            )
        settings = _settings_of(model)
        call = VAECall(x, settings, options, chunk_bytes=self._chunk_bytes)
        if not draws or not self._is_noisy:
            return call
        if self._device.type != self.cluster.request.device:
            raise UnsupportedError(
                f"this VAE draws noise while it decodes, and ComfyUI's is that of {self._device.type}, which the workers on "
                f"{self.cluster.request.device} do not have; use ComfyUI's own Load VAE for this graph"
            )
        found = self._from_here(call)
        for shape in self._drawn_by(call):  # so that what comes next is drawn as if this had been decoded here
            torch.randn(shape, device=self._device, dtype=self._dtype)
        return found

    def _from_here(self, call: VAECall) -> VAECall:
        """Drawing noise, if it does, as it would be drawn here next."""
        return dataclasses.replace(call, random_state=random_state(self._device)) if self._is_noisy else call

    def _drawn_by(self, call: VAECall) -> list[tuple[int, ...]]:
        key = (tuple(call.x.shape), *sorted(call.settings.items()))
        if key not in self._draws:
            asked = ask(VAEHost.draws, dataclasses.replace(call, x=torch.empty_like(call.x, device="cpu")))
            self._draws[key] = self.remote.call(asked, "counting noise", [0])[0]
        return self._draws[key]

    # ---- a whole video

    def _whole(self, model: VAEModel, x: Tensor, output_buffer: Tensor | None, options: Mapping[str, Any]) -> Tensor:
        config = self._config
        slabs = Slabs.of(model, x.shape, SequenceParallelGroup(config.of_group(1), 0)) if x.ndim == 5 else "sound"
        if self._device.type != self.cluster.request.device:
            slabs = f"ComfyUI has the VAE on {self._device.type}, and the workers meet on {self.cluster.request.device}"
        elif not isinstance(slabs, str) and not self._proves(model, config, max(x.shape[-2:])):
            slabs = "decoding together was tried, and is not what one worker gives"
        if isinstance(slabs, str):
            if x.ndim == 5 and config.world_size > 1:
                self._tell(f"the video is decoded by one worker: {slabs}")
            return self._on_one(ask(VAEHost.decode, self._call(model, x, options, draws=True)), "decoding")
        call = self._from_here(self._call(model, x, options))
        axis = "columns" if slabs.dim == -1 else "rows"
        self._tell(f"the video is decoded by {config.world_size} workers together, each with some of its {axis}")
        parts = self.remote.forward_on_each(call, config, "decoding", raise_if_cancelled)
        state = parts[0][1]
        if state is not None:
            set_random_state(self._device, state)
        return _joined([slab for slab, _ in parts], output_buffer)

    def _proves(self, model: VAEModel, config: ParallelConfig, most: int) -> bool:
        """Whether the workers decode a small video together as one does alone. most: latents of a length that can be cut."""
        if config in self._proved:
            return self._proved[config]
        group = SequenceParallelGroup(config.of_group(1), 0)
        shapes = [(1, self._channels, 2, 2, columns) for columns in range(config.world_size, most + 1)]
        shape = next(shape for shape in shapes if not isinstance(Slabs.of(model, shape, group), str))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._dtype)
        call = self._from_here(self._call(model, x, {}))
        try:
            error, tolerance = self.remote.call_together(
                ask_together(VAEHost.slab_test, call), config, "trying to decode together", poll=raise_if_cancelled
            )
        except (OutOfMemory, *RANK_LOST):
            raise
        except ClusterError as failure:
            logger.warning("decoding together was tried, and failed: %s", first_line(failure))
            self._proved[config] = False
            return False
        self._proved[config] = error <= tolerance
        if not self._proved[config]:
            logger.warning(
                "decoding together gave other pixels than decoding alone (%.1e of the largest, allowed %.1e): this ComfyUI's "
                "decoder is not known; update RayLTX", error, tolerance,
            )  # fmt: skip
        return self._proved[config]

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.info("%s", message)

    # ---- tiles

    @contextlib.contextmanager
    def tiles_shared(self) -> Iterator[None]:
        """Within the `with`, the tiles that ComfyUI cuts go to the workers, each whichever is free."""
        tiled = functools.partial(self._tiled, comfy.utils.tiled_scale_multidim)
        with replaced(comfy.utils, "tiled_scale_multidim", tiled):
            yield

    def _tiled(self, scale: Callable[..., Tensor], samples: Tensor, function: Callable[[Tensor], Tensor], *args: Any,
               **kwargs: Any) -> Tensor:  # fmt: skip
        """ComfyUI's own function, which cuts tiles and feathers them, run twice: to see what it cuts, and with the answers."""
        bound = inspect.signature(scale).bind(samples, function, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        places = _places_of(scale, arguments)
        bar = arguments["pbar"] or comfy.utils.ProgressBar(len(places))

        def calls() -> Iterator[Call[VAEHost, Tensor]]:
            for place in places:
                yield self._asked_for(function, samples[place])

        asked: Iterable[Call[VAEHost, Tensor]] = calls()
        if self._is_noisy and not arguments["downscale"]:
            # What they draw is asked of a worker, which has to be asked for nothing else at that time.
            asked = list(asked)
        self.ensure_loaded()
        answers = self._spread(asked, f"{len(places)} tiles")

        def answer(tile: Tensor) -> Tensor:
            self._tile = next(answers)
            try:
                return function(tile)
            finally:
                self._tile = None

        with contextlib.closing(answers), as_comfyui_says_it("tiles"):
            found = scale(**{**arguments, "function": answer, "pbar": bar})
        self._rest()
        return found

    def _asked_for(self, function: Callable[[Tensor], Tensor], tile: Tensor) -> Call[VAEHost, Tensor]:
        """What a function would ask the model for."""
        self._asking = True
        try:
            function(tile)
        except _Asked as asked:
            return asked.call
        finally:
            self._asking = False
        raise AssertionError("a tile that the model is not asked for")


def _joined(slabs: Sequence[Slab], output_buffer: Tensor | None) -> Tensor:
    """The video of its parts, copied to where it goes."""
    first = slabs[0]
    if output_buffer is None:
        shape = list(first.pixels.shape)
        shape[first.dim] = sum(slab.pixels.shape[first.dim] for slab in slabs)
        output_buffer = first.pixels.new_empty(shape)
    for slab in slabs:
        output_buffer.narrow(slab.dim, slab.start, slab.pixels.shape[slab.dim]).copy_(slab.pixels)
    return output_buffer


def _places_of(scale: Callable[..., Tensor], arguments: Mapping[str, Any]) -> list[tuple[slice, ...]]:
    """What ComfyUI cuts tiles from, in its order. It cuts tensors without memory for that, by which nothing is computed."""
    samples: Tensor = arguments["samples"]
    whole = torch.empty(samples.shape, device="meta")
    upscale, out_channels, reverse = (arguments[name] for name in ("upscale_amount", "out_channels", "downscale"))
    amounts = list(upscale) if isinstance(upscale, (list, tuple)) else [upscale] * len(arguments["tile"])
    places = []

    def scaled(dim: int, size: int) -> int:
        amount = amounts[dim]
        return round(amount(size) if callable(amount) else size / amount if reverse else amount * size)

    def note(tile: Tensor) -> Tensor:
        offset, place = tile.storage_offset(), []
        for stride, size in zip(whole.stride(), tile.shape):
            start, offset = divmod(int(offset), int(stride))
            place.append(slice(start, start + size))
        places.append(tuple(place))
        sizes = [scaled(dim, size) for dim, size in enumerate(tile.shape[2:])]
        return torch.empty((tile.shape[0], out_channels, *sizes), device="meta")

    scale(**{**arguments, "samples": whole, "function": note, "output_device": "meta", "pbar": None})
    return places


def _draws_noise(model: VAEModel) -> bool:
    """Whether decoding draws from the device's own generator."""
    if getattr(model, "timestep_conditioning", False):
        return True
    decoder = getattr(model, "decoder", None)
    return decoder is not None and any(getattr(layer, "inject_noise", False) for layer in decoder.modules())


def _modules_of(model: VAEModel) -> dict[str, tuple[type, bool, tuple[tuple[str, object], ...]]]:
    """By which a change of the model is seen: of its code, and of the settings of its parts. Its own are sent."""
    return {
        name: (type(module), "forward" in vars(module), tuple(sorted(_settings_of(module).items())))
        for name, module in model.named_modules()
        if name
    }


def _settings_of(module: torch.nn.Module) -> dict[str, object]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, _SETTING)}
    return {name: value for name, value in found.items() if not name.startswith("_") and name != "training"}


def _chunk_bytes_on(device: torch.device, model: VAEModel) -> int | None:
    """What ComfyUI would take through the decoder at once, if it decoded on a device."""
    largest = getattr(module_of(model.decoder), "get_max_chunk_size", None)
    return None if largest is None else int(largest(device))


def refuse_to_save() -> NoReturn:
    raise UnsupportedError(
        "this VAE holds no weights, they are with the Ray workers: it cannot be saved; load the file with ComfyUI's own Load VAE "
        "for that"
    )
